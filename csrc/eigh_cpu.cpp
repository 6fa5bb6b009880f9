// eigh on the CPU: which width of pack, and the groups of a batch shared among threads.
#include "eigh_cpu.h"

#include <algorithm>

#include "eigh.h"
#include "tasks.h"
#include "which_isa.h"
#include "workspaces.h"

namespace ses {
namespace {

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
    if (kernel.unroll > 1 && n > kMaxNTwoRegisters) continue;
    const long groups = (batch + kernel.lanes - 1) / kernel.lanes;
    const bool half = kernel.lanes < kernels.width[1].lanes;
    if (half && groups == 1) return {&kernel, 1, 1};
    if (half) continue;
    const double work = eigh_nanoseconds(n, kernel.unroll);
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

}  // namespace ses
