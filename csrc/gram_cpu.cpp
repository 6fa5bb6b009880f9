// Location, scale, Gram matrix and backward product on the CPU: several matrices a task where they
// are small, parts of one where they are few.
#include "gram_cpu.h"

#include <algorithm>
#include <vector>

#include "tasks.h"
#include "which_isa.h"
#include "workspaces.h"

namespace ses {

template <typename X, typename L>
void location_scale_cpu(const Samples<X>& x, const X* anchor, long anchor_stride, L* location,
                        L* scale, int threads) {
  const GramKernels<X, L>& kernels = SES_KERNELS_HERE(gram_kernels<X, L>);
  constexpr long kStrip = 256;
  const long strips = (x.columns + kStrip - 1) / kStrip;
  const Shares shares(x.batch, location_nanoseconds(x.rows, x.columns), strips, threads);
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

}  // namespace ses
