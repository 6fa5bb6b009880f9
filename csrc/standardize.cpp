// Compiled once for each instruction set, as eigh_cpu.cpp is and under the same rule: no inline
// function of the standard library. The loops over columns are left to the compiler's vectoriser.
#include "standardize.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ses {
namespace SES_ISA {

#include "simd.h"

namespace {

constexpr long kColumns = 1024;  // a strip's sums, maxima and anchor stay in the L1 cache
constexpr long kRows = 64;       // rows summed before their sum is added: bounds the rounding

// 2^-e with largest = m 2^e, m in [1/2, 1); 1 for 0. Both powers stay normal.
template <typename T>
T inverse_power_of_two(T largest) {
  using Traits = ScalarTraits<T>;
  if (largest == 0) return 1;
  typename Traits::Int bits;
  __builtin_memcpy(&bits, &largest, sizeof(bits));
  constexpr int kLimit = Traits::kExponentBias - 1;
  const int e = static_cast<int>(bits >> Traits::kMantissaBits) - kLimit;
  const int clamped = e > kLimit ? kLimit : e < -kLimit ? -kLimit : e;
  bits = static_cast<typename Traits::Int>(Traits::kExponentBias - clamped)
         << Traits::kMantissaBits;
  T scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return scale;
}

// Sums and largest magnitudes of x - anchor down one strip of columns.
template <typename T, bool kCenter>
T strip(const T* x, long row_stride, long rows, long columns, const T* __restrict anchor, T* mean) {
  T total[kColumns], part[kColumns], largest[kColumns];
  for (long j = 0; j < columns; ++j) total[j] = part[j] = largest[j] = 0;
  for (long i = 0; i < rows; ++i, x += row_stride) {
    for (long j = 0; j < columns; ++j) {
      const T shifted = kCenter ? x[j] - anchor[j] : x[j];
      const T magnitude = shifted < 0 ? -shifted : shifted;
      largest[j] = magnitude > largest[j] ? magnitude : largest[j];
      if (kCenter) part[j] += shifted;
    }
    if (kCenter && (i % kRows == kRows - 1 || i == rows - 1)) {
      for (long j = 0; j < columns; ++j) {
        total[j] += part[j];
        part[j] = 0;
      }
    }
  }
  T most = 0;
  for (long j = 0; j < columns; ++j) {
    if (kCenter) mean[j] = total[j] / static_cast<T>(rows);
    most = largest[j] > most ? largest[j] : most;
  }
  return most;
}

template <typename T>
void location_scale(const Samples<T>& s, T* location, T* scale) {
  for (long b = 0; b < s.batch; ++b) {
    const T* x = s.x + b * s.matrix_stride;
    T* anchor = location + 2 * b * s.columns;
    T most = 0;
    for (long j = 0; j < s.columns; j += kColumns) {
      const long columns = s.columns - j < kColumns ? s.columns - j : kColumns;
      T found;
      if (location != nullptr) {
        found = strip<T, true>(x + j, s.row_stride, s.rows, columns, anchor + j,
                               anchor + s.columns + j);
      } else {
        found = strip<T, false>(x + j, s.row_stride, s.rows, columns, nullptr, nullptr);
      }
      most = found > most ? found : most;
    }
    scale[b] = inverse_power_of_two(most);
  }
}

template <typename T>
void standardize(const Samples<T>& s, const T* location, long location_stride,
                 long location_row_stride, const T* scale, T* __restrict out) {
  for (long b = 0; b < s.batch; ++b) {
    const T* anchor = location + b * location_stride;
    const T* offset = anchor + location_row_stride;
    for (long i = 0; i < s.rows; ++i, out += s.columns) {
      const T* x = s.x + b * s.matrix_stride + i * s.row_stride;
      if (location != nullptr)
        for (long j = 0; j < s.columns; ++j) out[j] = ((x[j] - anchor[j]) - offset[j]) * scale[b];
      else
        for (long j = 0; j < s.columns; ++j) out[j] = x[j] * scale[b];
    }
  }
}

}  // namespace

template <typename T>
const StandardizeKernels<T>& standardize_kernels() {
  static constexpr StandardizeKernels<T> kernels = {location_scale<T>, standardize<T>};
  return kernels;
}
template const StandardizeKernels<float>& standardize_kernels<float>();
template const StandardizeKernels<double>& standardize_kernels<double>();

}  // namespace SES_ISA
}  // namespace ses
