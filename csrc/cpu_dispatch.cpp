// The CPU functions of bindings.cpp: pick the kernels for this machine, cut a call into tasks, and
// share those among threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "eigh.h"
#include "eigh_cpu.h"
#include "gram_cpu.h"
#include "parallel.h"
#include "rational_cpu.h"
#include "rational_from_samples.h"

namespace ses {
namespace {

#if defined(SES_X86)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("fma");
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
bool has_avx512() { return false; }
bool has_avx2() { return false; }
namespace avx512 = portable;
namespace avx2 = portable;
#endif

#define SES_KERNELS_HERE(...)           \
  (has_avx512() ? avx512::__VA_ARGS__() \
   : has_avx2() ? avx2::__VA_ARGS__()   \
                : portable::__VA_ARGS__())

// One aligned piece of memory for each worker. What a call used is kept for the next one: fresh
// pages would cost more than small matrices do.
class Workspaces {
 public:
  Workspaces(long bytes, int workers) : bytes_((bytes + kPage - 1) / kPage * kPage) {
    const long size = kPage + bytes_ * workers;
    block_ = kept.exchange(nullptr);
    if (block_ != nullptr && block_->size >= size) return;
    std::free(block_);
    void* memory = std::aligned_alloc(kPage, static_cast<std::size_t>(size));
    if (!memory) throw std::bad_alloc();
    block_ = new (memory) Block{size};
  }
  ~Workspaces() { std::free(block_->size > kMostKept ? block_ : kept.exchange(block_)); }
  Workspaces(const Workspaces&) = delete;
  Workspaces& operator=(const Workspaces&) = delete;

  void* operator[](int worker) const {
    return reinterpret_cast<char*>(block_) + kPage + worker * bytes_;
  }

 private:
  static constexpr long kPage = 4096, kMostKept = 32L << 20;
  struct Block {
    long size;
  };
  static inline std::atomic<Block*> kept{nullptr};

  long bytes_;
  Block* block_;
};

int workers_for(double nanoseconds, int threads) {
  return nanoseconds < 2 * kTeamNanoseconds ? 1 : threads;
}

// Tasks of a batch: several matrices each where they are small, parts of one where they are few.
struct Shares {
  int workers;
  long parts, matrices, tasks;

  Shares(long batch, double nanoseconds, long most_parts, int threads)
      : workers(workers_for(static_cast<double>(batch) * nanoseconds, threads)),
        parts(batch < 4L * workers && batch % workers != 0 ? std::min<long>(most_parts, workers)
                                                           : 1),
        matrices(parts > 1 ? 1 : std::max(1L, static_cast<long>(kTeamNanoseconds / nanoseconds))),
        tasks((batch + matrices - 1) / matrices * parts) {}

  // f(matrix, part) for all of a task
  template <typename F>
  void each(long task, long batch, F f) const {
    const long first = task / parts * matrices;
    for (long i = first; i < std::min(batch, first + matrices); ++i)
      f(i, static_cast<int>(task % parts));
  }
};

// One matrix's product of n x n sums over `depth`, or of an n x n matrix with `depth` columns.
double product_nanoseconds(long n, long depth) {
  const double size = static_cast<double>(n);
  return (0.015 * size + 0.3) * size * static_cast<double>(depth);
}

// Above, two registers a lane no longer fit the L2 cache, and the arithmetic hides the latencies.
constexpr int kUnrollLimit = 64;

// Nanoseconds of one group, as measured: about 5 n^3 multiply-adds a register, and 60 n^2 cycles in
// which the QL recurrence waits for itself, whatever the width.
template <typename T>
double group_work(const GroupKernel<T>& kernel, int n) {
  const double size = n;
  return 0.3 * (5 * size * kernel.unroll + 60) * size * size;
}

template <typename T>
struct Plan {
  const GroupKernel<T>* kernel;
  long groups;
  int workers;
};

// Half a register where the batch fits: it needs half the cache, and saves a quarter of the time.
// Otherwise the width that finishes first: idle lanes cost as much as busy ones, and idle threads.
template <typename T>
Plan<T> make_plan(const GroupKernels<T>& kernels, long batch, int n, int threads) {
  Plan<T> best{};
  double best_time = 0;
  for (const auto& kernel : kernels.width) {
    if (kernel.unroll > 1 && n > kUnrollLimit) continue;
    const long groups = (batch + kernel.lanes - 1) / kernel.lanes;
    const bool half = kernel.lanes < kernels.width[1].lanes;
    if (half && groups == 1) return {&kernel, 1, 1};
    if (half) continue;
    const double work = group_work(kernel, n);
    const int workers = workers_for(static_cast<double>(groups) * work, threads);
    const double time = static_cast<double>((groups + workers - 1) / workers) * work;
    if (best.kernel == nullptr || time < best_time) {
      best = {&kernel, groups, workers};
      best_time = time;
    }
  }
  return best;
}

}  // namespace

const char* simd_name() { return has_avx512() ? "avx512" : has_avx2() ? "avx2" : "portable"; }

template <typename T>
void eigh_cpu(const T* a, T* w, T* v, long batch, int n, int threads) {
  if (batch == 0) return;
  const Plan<T> plan = make_plan(SES_KERNELS_HERE(group_kernels<T>), batch, n, threads);
  const GroupKernel<T>& kernel = *plan.kernel;
  const Workspaces workspaces(kernel.workspace_bytes(n), plan.workers);
  parallel(plan.workers, plan.groups, [&](int worker, long group) {
    const long first = group * kernel.lanes, size = static_cast<long>(n) * n;
    const long count = std::min<long>(batch - first, kernel.lanes);
    kernel.run(a + first * size, w + first * n, v + first * size, static_cast<int>(count), n,
               workspaces[worker]);
  });
}

template void eigh_cpu(const float*, float*, float*, long, int, int);
template void eigh_cpu(const double*, double*, double*, long, int, int);

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
    const double n = layers[i].n;
    // Measured: 50 picoseconds times n^3, and what does not grow so fast.
    const double nanoseconds = (0.05 * n + 2) * n * n + grams.nanoseconds(i);
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

template <typename X, typename L>
void location_scale_cpu(const Samples<X>& x, const X* anchor, long anchor_stride, L* location,
                        L* scale, int threads) {
  const GramKernels<X, L>& kernels = SES_KERNELS_HERE(gram_kernels<X, L>);
  constexpr long kStrip = 256;
  const long strips = (x.columns + kStrip - 1) / kStrip;
  const double work = 0.2 * static_cast<double>(x.rows) * static_cast<double>(x.columns);
  const Shares shares(x.batch, work, strips, threads);
  std::vector<L> largest(static_cast<std::size_t>(x.batch * strips));
  parallel(shares.workers, shares.tasks, [&](int, long task) {
    shares.each(task, x.batch, [&](long b, int part) {
      for (long strip = part; strip < strips; strip += shares.parts) {
        const long first = strip * kStrip, last = std::min(x.columns, first + kStrip);
        const X* row = anchor == nullptr ? nullptr : anchor + b * anchor_stride;
        L* out = anchor == nullptr ? nullptr : location + 2 * b * x.columns;
        largest[b * strips + strip] = kernels.locate(x, b, first, last, row, out);
      }
    });
  });
  for (long b = 0; b < x.batch; ++b)
    scale[b] = kernels.inverse_power_of_two(
        *std::max_element(&largest[b * strips], &largest[b * strips] + strips));
}

template <typename X, typename L, typename K>
void gram_cpu(const Samples<X>& x, const Standard<L>& standard, Side side, K* gram, int threads) {
  const GramKernels<X, L>& kernels = SES_KERNELS_HERE(gram_kernels<X, L>);
  const auto& run = [&]() -> const auto& {
    if constexpr (sizeof(K) == sizeof(float))
      return kernels.gram_float;
    else
      return kernels.gram_double;
  }();
  const long n = side == Side::kSamples ? x.rows : x.columns;
  const long depth = side == Side::kSamples ? x.columns : x.rows;
  const Shares shares(x.batch, product_nanoseconds(n, depth), (n + 31) / 32, threads);
  const Workspaces workspaces(kernels.gram_bytes(n), shares.workers);
  parallel(shares.workers, shares.tasks, [&](int worker, long task) {
    shares.each(task, x.batch, [&](long b, int part) {
      run(x, standard, side, b, part, static_cast<int>(shares.parts), gram + b * n * n,
          workspaces[worker]);
    });
  });
}

template <typename X, typename L>
void gram_backward_cpu(const L* m, const Samples<X>& x, const Standard<L>& standard, const L* g,
                       long g_stride, Side side, X* out, int threads) {
  const GramKernels<X, L>& kernels = SES_KERNELS_HERE(gram_kernels<X, L>);
  const long n = side == Side::kSamples ? x.rows : x.columns;
  const long other = side == Side::kSamples ? x.columns : x.rows;
  const Shares shares(x.batch, product_nanoseconds(n, other), (other + 63) / 64, threads);
  const Workspaces workspaces(kernels.backward_bytes(n), shares.workers);
  parallel(shares.workers, shares.tasks, [&](int worker, long task) {
    shares.each(task, x.batch, [&](long b, int part) {
      const L coefficient = 2 * standard.scale[b] * g[b * g_stride];
      kernels.backward(m + b * n * n, x, standard, coefficient, side, b, part,
                       static_cast<int>(shares.parts), out + b * x.rows * x.columns,
                       workspaces[worker]);
    });
  });
}

#define SES_INSTANTIATE(X, L)                                                                      \
  template void location_scale_cpu(const Samples<X>&, const X*, long, L*, L*, int);                \
  template void gram_cpu(const Samples<X>&, const Standard<L>&, Side, float*, int);                \
  template void gram_cpu(const Samples<X>&, const Standard<L>&, Side, double*, int);               \
  template void gram_backward_cpu(const L*, const Samples<X>&, const Standard<L>&, const L*, long, \
                                  Side, X*, int);
SES_INSTANTIATE(float, float)
SES_INSTANTIATE(float, double)
SES_INSTANTIATE(double, double)
#undef SES_INSTANTIATE

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
