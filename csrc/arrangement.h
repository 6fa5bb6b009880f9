// How the Gram matrices lie that the rational kernels of the CPU take: kLanes doubles side by side
// for SIMD, whatever the width of a register.
//
//   n <= kMaxNLanes  up to kLanes matrices interleaved, the lower triangle of [n, n, kLanes]
//   larger           one matrix in panels, [panels, rows, kLanes] with rows = n rounded up to whole
//                    panels: the lower triangle with whole blocks on the diagonal, 0 beyond n
#pragma once

namespace ses {

constexpr int kLanes = 8;
constexpr int kMaxNLanes = 32;

static inline constexpr int together(int n) { return n <= kMaxNLanes ? kLanes : 1; }

static inline constexpr long arranged_doubles(long n) {
  const long rows = (n + kLanes - 1) / kLanes * kLanes;
  return n <= kMaxNLanes ? n * n * kLanes : rows * rows;
}

}  // namespace ses
