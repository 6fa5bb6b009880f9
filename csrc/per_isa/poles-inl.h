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

// log x ~ constant - sum_j w_j / (x + t_j), t ascending. Those added to fill packs and blocks have
// no weight.
template <typename Scalar>
struct PaddedPoles {
  Scalar constant;
  int count;
  alignas(64) Scalar t[kMaxPoles], w[kMaxPoles];

  explicit PaddedPoles(const Poles& poles) : constant(poles.constant), count(poles.count) {
    for (int j = 0; j < kMaxPoles; ++j) {
      t[j] = j < count ? poles.t[j] : Scalar(1);
      w[j] = j < count ? poles.w[j] : Scalar(0);
    }
  }
};

template <typename Scalar>
SES_INLINE bool has_spectrum(Scalar trace) {
  return trace > 0 && trace < ScalarTraits<Scalar>::kInf;
}

// H and M: no variance has no entropy, and NaN or Inf stay NaN.
template <typename Scalar>
SES_INLINE Scalar without_spectrum(Scalar trace) {
  return trace == 0 ? Scalar(0) : ScalarTraits<Scalar>::kNaN;
}

}  // namespace SES_ISA
}  // namespace ses
