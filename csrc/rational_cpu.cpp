// The rational solver on the CPU, from Gram matrices and from samples: the matrices of all layers
// shared among threads.
#include "rational_cpu.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "rational_from_samples.h"
#include "tasks.h"
#include "which_isa.h"
#include "workspaces.h"

namespace ses {
namespace {

template <typename M>
Arrangement arrangement_of(const GramLayer<double, M>& layer) {
  return ses::arrangement_of(layer.n, layer.batch);
}

// Matrices of one layer that a worker solves, as many at a time as go together.
struct Solve {
  int layer;
  long first;
  int count;
};

struct SolvePlan {
  std::vector<Solve> tasks;
  int workers;
};

// The largest matrices first, so that none of them is the last to be taken; small ones by the
// dozen. grams.nanoseconds(layer) is what one Gram matrix takes.
template <typename M, typename Grams>
SolvePlan make_solve_plan(const GramLayer<double, M>* layers, int count, int threads,
                          const Grams& grams) {
  std::vector<int> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int one, int other) { return layers[one].n > layers[other].n; });
  SolvePlan plan{};
  double work = 0;
  for (const int i : order) {
    const double nanoseconds = rational_nanoseconds(layers[i].n) + grams.nanoseconds(i);
    const long batch = layers[i].batch;
    const long together = ses::together(arrangement_of(layers[i]), layers[i].n);
    const double calls = kTeamNanoseconds / (nanoseconds * static_cast<double>(together));
    const long step = together * std::max(1L, static_cast<long>(calls));
    for (long first = 0; first < batch; first += step)
      plan.tasks.push_back({i, first, static_cast<int>(std::min(step, batch - first))});
    work += static_cast<double>(batch) * nanoseconds;
  }
  plan.workers = workers_for(work, threads);
  return plan;
}

// grams(layer, first, count, memory) arranges Gram matrices at the beginning of `memory`, which has
// grams.bytes(layer), a multiple of 64.
template <typename M, typename Grams>
void solve(const GramLayer<double, M>* layers, int count, const SolvePlan& plan, const Poles& poles,
           const Grams& grams) {
  const RationalKernel<M>& kernel = SES_KERNELS_HERE(rational_kernel<M>);
  long for_grams = 0, for_kernel = 0;
  for (int i = 0; i < count; ++i) {
    for_grams = std::max(for_grams, grams.bytes(i));
    for_kernel = std::max(
        for_kernel, kernel.workspace_bytes(arrangement_of(layers[i]), layers[i].n, poles.count));
  }
  const Workspaces workspaces(for_grams + for_kernel, plan.workers);
  parallel(plan.workers, static_cast<long>(plan.tasks.size()), [&](int worker, long i) {
    const Solve& task = plan.tasks[i];
    const GramLayer<double, M>& layer = layers[task.layer];
    const Arrangement arrangement = arrangement_of(layer);
    const long end = task.first + task.count, step = together(arrangement, layer.n);
    char* memory = static_cast<char*>(workspaces[worker]);
    for (long first = task.first; first < end; first += step) {
      GramLayer<double, M> part = layer;
      part.batch = std::min(step, end - first);
      grams(task.layer, first, static_cast<int>(part.batch), memory);
      part.gram = reinterpret_cast<const double*>(memory);
      part.h += first;
      if (part.m != nullptr) part.m += first * layer.n * layer.n;
      kernel.run(arrangement, part, poles, memory + for_grams);
    }
  });
}

template <typename M>
long arranged_bytes(const GramLayer<double, M>& layer) {
  return arranged_doubles(arrangement_of(layer), layer.n) * static_cast<long>(sizeof(double));
}

// As they were given.
template <typename M>
struct GivenGrams {
  const GramLayer<double, M>* layers;

  long bytes(int i) const { return arranged_bytes(layers[i]); }
  double nanoseconds(int) const { return 0; }
  void operator()(int i, long first, int count, void* memory) const {
    const int n = layers[i].n;
    const double* grams = layers[i].gram + first * n * n;
    SES_KERNELS_HERE(rational_kernel<M>)
        .arrange(arrangement_of(layers[i]), grams, count, n, static_cast<double*>(memory));
  }
};

// Made by the worker that needs them, which then has them in its cache.
template <typename T>
struct MadeGrams {
  const SampleLayer<T>* layers;
  const GramKernels<T, T>& kernels;

  long bytes(int i) const {
    const auto& result = layers[i].result;
    return arranged_bytes(result) + kernels.arranged_bytes(arrangement_of(result), result.n);
  }
  double nanoseconds(int i) const {
    const long n = layers[i].result.n;
    return product_nanoseconds(n, layers[i].x.rows * layers[i].x.columns / n);
  }
  void operator()(int i, long first, int count, void* memory) const {
    const SampleLayer<T>& layer = layers[i];
    const Samples<T>& x = layer.x;
    const bool center = layer.location != nullptr;
    for (long b = first; b < first + count; ++b)
      layer.scale[b] = kernels.inverse_power_of_two(
          kernels.locate(x, b, 0, x.columns, center ? x.x + b * x.matrix_stride : nullptr,
                         center ? layer.location + 2 * b * x.columns : nullptr));
    const Standard<T> standard{layer.location, 2 * x.columns, x.columns, layer.scale};
    kernels.gram_arranged(arrangement_of(layer.result), x, standard, layer.side, first, count,
                          static_cast<double*>(memory),
                          static_cast<char*>(memory) + arranged_bytes(layer.result));
  }
};

}  // namespace

template <typename M>
void rational_cpu(const GramLayer<double, M>* layers, int count, const Poles& poles, int threads) {
  const GivenGrams<M> given{layers};
  solve(layers, count, make_solve_plan(layers, count, threads, given), poles, given);
}

template void rational_cpu(const GramLayer<double, float>*, int, const Poles&, int);
template void rational_cpu(const GramLayer<double, double>*, int, const Poles&, int);

template <typename T>
void rational_from_samples_cpu(const SampleLayer<T>* layers, int count, const Poles& poles,
                               int threads) {
  std::vector<GramLayer<double, T>> results;
  long entries = 0;
  for (int i = 0; i < count; ++i) {
    results.push_back(layers[i].result);
    entries += results[i].batch * results[i].n * results[i].n;
  }
  const MadeGrams<T> made{layers, SES_KERNELS_HERE(gram_kernels<T, T>)};
  const SolvePlan plan = make_solve_plan(results.data(), count, threads, made);
  if (plan.workers == 1 || static_cast<int>(plan.tasks.size()) >= 4 * plan.workers)
    return solve(results.data(), count, plan, poles, made);
  // Too few for equal shares: all workers make one Gram matrix after the other.
  const std::unique_ptr<double[]> grams(new double[static_cast<std::size_t>(entries)]);
  double* gram = grams.get();
  for (int i = 0; i < count; ++i) {
    const SampleLayer<T>& layer = layers[i];
    const Samples<T>& x = layer.x;
    location_scale_cpu(x, layer.location == nullptr ? nullptr : x.x, x.matrix_stride,
                       layer.location, layer.scale, threads);
    const Standard<T> standard{layer.location, 2 * x.columns, x.columns, layer.scale};
    gram_cpu(x, standard, layer.side, gram, threads);
    results[i].gram = gram;
    gram += results[i].batch * results[i].n * results[i].n;
  }
  rational_cpu(results.data(), count, poles, threads);
}

template void rational_from_samples_cpu(const SampleLayer<float>*, int, const Poles&, int);
template void rational_from_samples_cpu(const SampleLayer<double>*, int, const Poles&, int);

}  // namespace ses
