// Location, scale, Gram matrix and backward product on the CPU: several matrices a task where they
// are small, parts of one where they are few.
#include "gram_cpu.h"

#include <algorithm>
#include <vector>

#include "tasks.h"
#include "which_isa.h"
#include "workspaces.h"

namespace ses {

template <typename Number>
void location_scale_cpu(const Samples& x, const void* anchor, long anchor_stride, Number* location,
                        Number* scale, int threads) {
  const GramKernels<Number>& kernels = SES_KERNELS_HERE(gram_kernels<Number>);
  constexpr long kStrip = 256;
  const long strips = (x.columns + kStrip - 1) / kStrip;
  const Shares shares(x.batch, location_nanoseconds(x.rows, x.columns), strips, threads);
  std::vector<Number> largest(static_cast<std::size_t>(x.batch * strips));
  parallel(shares.workers, shares.tasks, [&](int, long task) {
    shares.each(task, x.batch, [&](long b, int part) {
      for (long strip = part; strip < strips; strip += shares.parts) {
        const long first = strip * kStrip, last = std::min(x.columns, first + kStrip);
        Number* out = anchor == nullptr ? nullptr : location + 2 * b * x.columns;
        largest[b * strips + strip] = kernels.locate(x, b, first, last, anchor, anchor_stride, out);
      }
    });
  });
  for (long b = 0; b < x.batch; ++b)
    scale[b] = kernels.inverse_power_of_two(
        *std::max_element(&largest[b * strips], &largest[b * strips] + strips));
}

template <typename Number, typename Entry>
void gram_cpu(const Samples& x, const Standard<Number>& standard, Side side, Entry* gram,
              int threads) {
  const GramKernels<Number>& kernels = SES_KERNELS_HERE(gram_kernels<Number>);
  const auto& run = [&]() -> const auto& {
    if constexpr (sizeof(Entry) == sizeof(float))
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

template <typename Number>
void gram_backward_cpu(const Number* m, const Samples& x, const Standard<Number>& standard,
                       const Number* g, long g_stride, Side side, void* out, int threads) {
  const GramKernels<Number>& kernels = SES_KERNELS_HERE(gram_kernels<Number>);
  const long n = side == Side::kSamples ? x.rows : x.columns;
  const long other = side == Side::kSamples ? x.columns : x.rows;
  const Shares shares(x.batch, product_nanoseconds(n, other), (other + 63) / 64, threads);
  const Workspaces workspaces(kernels.backward_bytes(n), shares.workers);
  parallel(shares.workers, shares.tasks, [&](int worker, long task) {
    shares.each(task, x.batch, [&](long b, int part) {
      const Number coefficient = 2 * standard.scale[b] * g[b * g_stride];
      kernels.backward(
          m + b * n * n, x, standard, coefficient, side, b, part, static_cast<int>(shares.parts),
          static_cast<char*>(out) + b * x.rows * x.columns * itemsize(x.type), workspaces[worker]);
    });
  });
}

#define SES_INSTANTIATE(Number)                                                               \
  template void location_scale_cpu(const Samples&, const void*, long, Number*, Number*, int); \
  template void gram_cpu(const Samples&, const Standard<Number>&, Side, float*, int);         \
  template void gram_cpu(const Samples&, const Standard<Number>&, Side, double*, int);        \
  template void gram_backward_cpu(const Number*, const Samples&, const Standard<Number>&,     \
                                  const Number*, long, Side, void*, int);
SES_INSTANTIATE(float)
SES_INSTANTIATE(double)
#undef SES_INSTANTIATE

}  // namespace ses
