// The partial fractions as the CPU kernels take them, and what they do with matrices that have no
// spectrum to speak of.
#pragma once

#include "rational.h"
#include "simd-inl.h"

namespace ses {
namespace SES_ISA {

// Poles summed in registers at a time; a divisor of every set's number of poles.
#if defined(__AVX512F__)
constexpr int kPoleBlock = 12;
#elif defined(__AVX2__)
constexpr int kPoleBlock = 6;
#else
constexpr int kPoleBlock = 3;
#endif
constexpr int kPoleScalings = 12;  // by 4 each, where rounding left P + t_1 I indefinite

// log x ~ c - sum_j w_j / (x + t_j), t ascending. Those added to fill packs and blocks have no
// weight.
template <typename T>
struct PaddedPoles {
  T c;
  int count;
  alignas(64) T t[kMaxPoles], w[kMaxPoles];

  explicit PaddedPoles(const Poles& poles) : c(poles.c), count(poles.count) {
    for (int j = 0; j < kMaxPoles; ++j) {
      t[j] = j < count ? poles.t[j] : T(1);
      w[j] = j < count ? poles.w[j] : T(0);
    }
  }
};

template <typename T>
SES_INLINE bool has_spectrum(T trace) {
  return trace > 0 && trace < ScalarTraits<T>::kInf;
}

// H and M: no variance has no entropy, and NaN or Inf stay NaN.
template <typename T>
SES_INLINE T without_spectrum(T trace) {
  return trace == 0 ? T(0) : ScalarTraits<T>::kNaN;
}

}  // namespace SES_ISA
}  // namespace ses
