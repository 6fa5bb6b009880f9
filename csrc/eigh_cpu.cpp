// eigh on the CPU: which width of pack, and the bundles of a batch shared among threads.
#include "eigh_cpu.h"

#include <algorithm>

#include "eigh.h"
#include "tasks.h"
#include "which_isa.h"
#include "workspaces.h"

namespace ses {
namespace {

template <typename Scalar>
struct Choice {
  const BundleKernel<Scalar>* kernel;
  long bundles;
  int workers;
};

// Half a register where the batch fits: it needs half the cache, and saves a quarter of the time.
// Otherwise the width that finishes first: idle lanes cost as much as busy ones, and idle threads.
template <typename Scalar>
Choice<Scalar> choose(const BundleKernels<Scalar>& kernels, long batch, int n, int threads) {
  Choice<Scalar> best{};
  double best_time = 0;
  for (const auto& kernel : kernels.of_size) {
    if (kernel.unroll > 1 && n > kMaxNTwoRegisters) continue;
    const long bundles = (batch + kernel.lanes - 1) / kernel.lanes;
    const bool half = kernel.lanes < kernels.of_size[1].lanes;
    if (half && bundles == 1) return {&kernel, 1, 1};
    if (half) continue;
    const double work = eigh_nanoseconds(n, kernel.unroll);
    const int workers = workers_for(static_cast<double>(bundles) * work, threads);
    const double time = static_cast<double>((bundles + workers - 1) / workers) * work;
    if (best.kernel == nullptr || time < best_time) {
      best = {&kernel, bundles, workers};
      best_time = time;
    }
  }
  return best;
}

}  // namespace

template <typename Scalar>
void eigh_cpu(const Scalar* a, Scalar* w, Scalar* v, long batch, int n, int threads) {
  if (batch == 0) return;
  const Choice<Scalar> choice = choose(SES_KERNELS_HERE(bundle_kernels<Scalar>), batch, n, threads);
  const BundleKernel<Scalar>& kernel = *choice.kernel;
  const Workspaces workspaces(kernel.workspace_bytes(n), choice.workers);
  parallel(choice.workers, choice.bundles, [&](int worker, long bundle) {
    const long first = bundle * kernel.lanes, size = static_cast<long>(n) * n;
    const long count = std::min<long>(batch - first, kernel.lanes);
    kernel.run(a + first * size, w + first * n, v + first * size, static_cast<int>(count), n,
               workspaces[worker]);
  });
}

template void eigh_cpu(const float*, float*, float*, long, int, int);
template void eigh_cpu(const double*, double*, double*, long, int, int);

}  // namespace ses
