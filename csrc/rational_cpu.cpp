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

template <typename Result>
Arrangement arrangement_of(const GramLayer<double, Result>& layer) {
  return ses::arrangement_of(layer.n, layer.batch);
}

// Matrices of one layer that a worker solves, as many at a time as go together.
struct Solve {
  int layer;
  long first;
  int count;
};

struct Schedule {
  std::vector<Solve> tasks;
  int workers;
  long shared = 0;  // the first tasks, one matrix each, by `groups` groups of `threads`
  int groups = 0, threads = 0;
};

// The largest matrices first, so that none of them is the last to be taken; small ones by the
// dozen. grams.nanoseconds(layer) is what one Gram matrix takes.
template <typename Result, typename Grams>
Schedule make_schedule(const GramLayer<double, Result>* layers, int count, int threads,
                       const Grams& grams) {
  std::vector<int> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int one, int other) { return layers[one].n > layers[other].n; });
  Schedule schedule{};
  double work = 0;
  for (const int i : order) {
    const double nanoseconds = rational_nanoseconds(layers[i].n) + grams.nanoseconds(i);
    const long batch = layers[i].batch;
    const long together = ses::together(arrangement_of(layers[i]), layers[i].n);
    const double calls = kTeamNanoseconds / (nanoseconds * static_cast<double>(together));
    const long step = together * std::max(1L, static_cast<long>(calls));
    for (long first = 0; first < batch; first += step)
      schedule.tasks.push_back({i, first, static_cast<int>(std::min(step, batch - first))});
    work += static_cast<double>(batch) * nanoseconds;
  }
  schedule.workers = workers_for(work, threads);
  // A matrix that would keep one worker when all others have done the rest is shared.
  for (const Solve& task : schedule.tasks) {
    const int n = layers[task.layer].n;
    const double alone = rational_nanoseconds(n) + grams.nanoseconds(task.layer);
    if (parts_of(n) < 2 || schedule.workers * alone <= work) break;
    work -= alone;
    ++schedule.shared;
    schedule.threads = parts_of(n);
  }
  if (schedule.shared > 0) {
    const long each = std::max(1L, schedule.workers / schedule.shared);
    schedule.threads = power_of_two_below(std::min(schedule.threads, static_cast<int>(each)));
    if (schedule.threads < 2)
      schedule.shared = 0;
    else
      schedule.groups =
          static_cast<int>(std::min<long>(schedule.shared, schedule.workers / schedule.threads));
  }
  return schedule;
}

// What a worker or a group solves in: `for_grams` bytes of arranged Gram matrices, and the
// kernel's.
struct Memory {
  long for_grams = 0, for_kernel = 0;

  // For the tasks [first, last).
  template <typename Result, typename Grams>
  Memory(const GramLayer<double, Result>* layers, const Schedule& schedule, long first, long last,
         const Poles& poles, const Grams& grams, int threads) {
    const RationalKernel<Result>& kernel = SES_KERNELS_HERE(rational_kernel<Result>);
    for (long i = first; i < last; ++i) {
      const int at = schedule.tasks[i].layer;
      const GramLayer<double, Result>& layer = layers[at];
      for_grams = std::max(for_grams, grams.bytes(at));
      for_kernel = std::max(
          for_kernel, kernel.workspace_bytes(arrangement_of(layer), layer.n, poles.count, threads));
    }
  }
  long bytes() const { return for_grams + for_kernel; }
};

// Every thread of the group calls it. grams(layer, first, count, memory, group) arranges Gram
// matrices at the beginning of `memory`, which has grams.bytes(layer), a multiple of 64.
template <typename Result, typename Grams>
void solve_task(const GramLayer<double, Result>* layers, const Solve& task, const Poles& poles,
                const Grams& grams, char* memory, long for_grams, CpuGroup& group) {
  const RationalKernel<Result>& kernel = SES_KERNELS_HERE(rational_kernel<Result>);
  const GramLayer<double, Result>& layer = layers[task.layer];
  const Arrangement arrangement = arrangement_of(layer);
  const long end = task.first + task.count, step = together(arrangement, layer.n);
  for (long first = task.first; first < end; first += step) {
    GramLayer<double, Result> part = layer;
    part.batch = std::min(step, end - first);
    grams(task.layer, first, static_cast<int>(part.batch), memory, group);
    part.gram = reinterpret_cast<const double*>(memory);
    part.h += first;
    if (part.m != nullptr) part.m += first * layer.n * layer.n;
    if (!group.sync()) return;
    kernel.run(arrangement, part, poles, memory + for_grams, group);
  }
}

template <typename Result, typename Grams>
void solve(const GramLayer<double, Result>* layers, const Schedule& schedule, const Poles& poles,
           const Grams& grams) {
  const long tasks = static_cast<long>(schedule.tasks.size());
  if (schedule.shared > 0) {
    const Memory each(layers, schedule, 0, schedule.shared, poles, grams, schedule.threads);
    const Workspaces workspaces(each.bytes(), schedule.groups);
    parallel_groups(schedule.workers, schedule.groups, schedule.threads, schedule.shared,
                    [&](CpuGroup& group, int index, long i) {
                      solve_task(layers, schedule.tasks[i], poles, grams,
                                 static_cast<char*>(workspaces[index]), each.for_grams, group);
                    });
  }
  if (schedule.shared == tasks) return;
  const Memory each(layers, schedule, schedule.shared, tasks, poles, grams, 1);
  const Workspaces workspaces(each.bytes(), schedule.workers);
  parallel(schedule.workers, tasks - schedule.shared, [&](int worker, long i) {
    CpuGroup alone;
    solve_task(layers, schedule.tasks[schedule.shared + i], poles, grams,
               static_cast<char*>(workspaces[worker]), each.for_grams, alone);
  });
}

template <typename Result>
long arranged_bytes(const GramLayer<double, Result>& layer) {
  return arranged_doubles(arrangement_of(layer), layer.n) * static_cast<long>(sizeof(double));
}

// As they were given.
template <typename Result>
struct GivenGrams {
  const GramLayer<double, Result>* layers;

  long bytes(int i) const { return arranged_bytes(layers[i]); }
  double nanoseconds(int) const { return 0; }
  void operator()(int i, long first, int count, void* memory, const CpuGroup& group) const {
    const int n = layers[i].n;
    const double* grams = layers[i].gram + first * n * n;
    SES_KERNELS_HERE(rational_kernel<Result>)
        .arrange(arrangement_of(layers[i]), grams, count, n, static_cast<double*>(memory), group);
  }
};

// Made by the worker that needs them, which then has them in its cache. Not for groups of several.
template <typename Scalar>
struct MadeGrams {
  const SampleLayer<Scalar>* layers;
  const GramKernels<Scalar>& kernels;

  long bytes(int i) const {
    const auto& result = layers[i].result;
    return arranged_bytes(result) + kernels.arranged_bytes(arrangement_of(result), result.n);
  }
  double nanoseconds(int i) const {
    const long n = layers[i].result.n;
    return product_nanoseconds(n, layers[i].x.rows * layers[i].x.columns / n);
  }
  void operator()(int i, long first, int count, void* memory, const CpuGroup&) const {
    const SampleLayer<Scalar>& layer = layers[i];
    const Samples& x = layer.x;
    const bool center = layer.location != nullptr;
    for (long b = first; b < first + count; ++b)
      layer.scale[b] = kernels.inverse_power_of_two(
          kernels.locate(x, b, 0, x.columns, center ? x.x : nullptr, x.matrix_stride,
                         center ? layer.location + 2 * b * x.columns : nullptr));
    const Standard<Scalar> standard{layer.location, 2 * x.columns, x.columns, layer.scale};
    kernels.gram_arranged(arrangement_of(layer.result), x, standard, layer.side, first, count,
                          static_cast<double*>(memory),
                          static_cast<char*>(memory) + arranged_bytes(layer.result));
  }
};

}  // namespace

template <typename Result>
void rational_cpu(const GramLayer<double, Result>* layers, int count, const Poles& poles,
                  int threads) {
  const GivenGrams<Result> given{layers};
  solve(layers, make_schedule(layers, count, threads, given), poles, given);
}

template void rational_cpu(const GramLayer<double, float>*, int, const Poles&, int);
template void rational_cpu(const GramLayer<double, double>*, int, const Poles&, int);

template <typename Scalar>
void rational_from_samples_cpu(const SampleLayer<Scalar>* layers, int count, const Poles& poles,
                               int threads) {
  std::vector<GramLayer<double, Scalar>> results;
  long entries = 0;
  for (int i = 0; i < count; ++i) {
    results.push_back(layers[i].result);
    entries += results[i].batch * results[i].n * results[i].n;
  }
  const MadeGrams<Scalar> made{layers, SES_KERNELS_HERE(gram_kernels<Scalar>)};
  const Schedule schedule = make_schedule(results.data(), count, threads, made);
  const bool many = static_cast<int>(schedule.tasks.size()) >= 4 * schedule.workers;
  if (schedule.workers == 1 || (many && schedule.shared == 0))
    return solve(results.data(), schedule, poles, made);
  // Too few for equal shares: all workers make one Gram matrix after the other.
  const std::unique_ptr<double[]> grams(new double[static_cast<std::size_t>(entries)]);
  double* gram = grams.get();
  for (int i = 0; i < count; ++i) {
    const SampleLayer<Scalar>& layer = layers[i];
    const Samples& x = layer.x;
    location_scale_cpu(x, layer.location == nullptr ? nullptr : x.x, x.matrix_stride,
                       layer.location, layer.scale, threads);
    const Standard<Scalar> standard{layer.location, 2 * x.columns, x.columns, layer.scale};
    gram_cpu(x, standard, layer.side, gram, threads);
    results[i].gram = gram;
    gram += results[i].batch * results[i].n * results[i].n;
  }
  rational_cpu(results.data(), count, poles, threads);
}

template void rational_from_samples_cpu(const SampleLayer<float>*, int, const Poles&, int);
template void rational_from_samples_cpu(const SampleLayer<double>*, int, const Poles&, int);

}  // namespace ses
