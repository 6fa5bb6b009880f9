// eigh_cpu: picks the kernels for this machine, the width of a group for this batch, and the
// threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <system_error>
#include <thread>

#include "eigh.h"
#include "eigh_cpu.h"
#include "standardize.h"

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

template <typename T>
const GroupKernels<T>& kernels_here() {
  static const GroupKernels<T>& kernels = has_avx512() ? avx512::group_kernels<T>()
                                          : has_avx2() ? avx2::group_kernels<T>()
                                                       : portable::group_kernels<T>();
  return kernels;
}

// Starting a thread costs some tens of microseconds: each must have this much to do, in the units
// of group_work.
constexpr double kThreadWork = 4e5;

// Above, two registers a lane no longer fit the L2 cache, and the arithmetic hides the latencies.
constexpr int kUnrollLimit = 64;

// Time of one group, as measured: about 5 n^3 multiply-adds a register, and 60 n^2 cycles in which
// the QL recurrence waits for itself, whatever the width.
template <typename T>
double group_work(const GroupKernel<T>& kernel, int n) {
  const double size = n;
  return (5 * size * kernel.unroll + 60) * size * size;
}

template <typename T>
struct Plan {
  const GroupKernel<T>* kernel;
  long groups, workers;
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
    const long worthwhile = static_cast<long>(static_cast<double>(groups) * work / kThreadWork);
    const long workers = std::max(1L, std::min({worthwhile, groups, static_cast<long>(threads)}));
    const double time = static_cast<double>((groups + workers - 1) / workers) * work;
    if (best.kernel == nullptr || time < best_time) {
      best = {&kernel, groups, workers};
      best_time = time;
    }
  }
  return best;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

}  // namespace

const char* simd_name() { return has_avx512() ? "avx512" : has_avx2() ? "avx2" : "portable"; }

template <typename T>
void eigh_cpu(const T* a, T* w, T* v, long batch, int n, int threads) {
  if (batch == 0) return;
  const Plan<T> plan = make_plan(kernels_here<T>(), batch, n, threads);
  const GroupKernel<T>& kernel = *plan.kernel;
  const long groups = plan.groups, workers = plan.workers;

  constexpr long kPage = 4096;
  const long bytes = (kernel.workspace_bytes(n) + kPage - 1) / kPage * kPage;
  std::unique_ptr<char, Free> memory(
      static_cast<char*>(std::aligned_alloc(kPage, static_cast<std::size_t>(bytes * workers))));
  if (!memory) throw std::bad_alloc();

  std::atomic<long> next{0};
  auto work = [&](long worker) {
    void* workspace = memory.get() + worker * bytes;
    for (long group; (group = next.fetch_add(1, std::memory_order_relaxed)) < groups;) {
      const long first = group * kernel.lanes, size = static_cast<long>(n) * n;
      const long count = batch - first < kernel.lanes ? batch - first : kernel.lanes;
      kernel.run(a + first * size, w + first * n, v + first * size, static_cast<int>(count), n,
                 workspace);
    }
  };
  // Threads of the call, not of the process: nothing is left for a fork to break.
  std::unique_ptr<std::thread[]> team(new std::thread[static_cast<std::size_t>(workers)]);
  long started = 1;
  try {
    for (; started < workers; ++started) team[started] = std::thread(work, started);
  } catch (const std::system_error&) {
    // No more threads to be had: those there are take all the groups.
  }
  work(0);
  for (long i = 1; i < started; ++i) team[i].join();
}

template <typename T>
const StandardizeKernels<T>& standardize_kernels() {
  static const StandardizeKernels<T>& kernels = has_avx512() ? avx512::standardize_kernels<T>()
                                                : has_avx2() ? avx2::standardize_kernels<T>()
                                                             : portable::standardize_kernels<T>();
  return kernels;
}
template const StandardizeKernels<float>& standardize_kernels<float>();
template const StandardizeKernels<double>& standardize_kernels<double>();

template void eigh_cpu(const float*, float*, float*, long, int, int);
template void eigh_cpu(const double*, double*, double*, long, int, int);

}  // namespace ses
