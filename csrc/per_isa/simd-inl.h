// A pack of SIMD registers. A lane of it is one matrix of a batch, or one column of a matrix.
//
// Every operation is elementwise, and a * b + sum is fused only where fma() says so (the build
// turns contraction off): a lane then computes the same digits whatever the width of the pack,
// whatever its neighbours hold, and on every x86 with FMA.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ses {
namespace SES_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <typename Scalar>
struct ScalarTraits;

template <>
struct ScalarTraits<float> {
  using Int = int;
  static constexpr Int kSignBit = static_cast<Int>(0x80000000u);
  static constexpr Int kInfBits = 0x7f800000;
  static constexpr int kMantissaBits = 23;
  static constexpr int kExponentBias = 127;
  static constexpr float kEps = __FLT_EPSILON__;
  static constexpr float kMinNormal = __FLT_MIN__;
  static constexpr float kInf = __builtin_inff();
  static constexpr float kNaN = __builtin_nanf("");
};

template <>
struct ScalarTraits<double> {
  using Int = long long;
  static constexpr Int kSignBit = static_cast<Int>(0x8000000000000000u);
  static constexpr Int kInfBits = 0x7ff0000000000000;
  static constexpr int kMantissaBits = 52;
  static constexpr int kExponentBias = 1023;
  static constexpr double kEps = __DBL_EPSILON__;
  static constexpr double kMinNormal = __DBL_MIN__;
  static constexpr double kInf = __builtin_inf();
  static constexpr double kNaN = __builtin_nan("");
};

#define SES_INLINE static inline __attribute__((always_inline))

template <typename Scalar, int kBytes>
struct Register {
  typedef Scalar Vec __attribute__((vector_size(kBytes)));
  typedef typename ScalarTraits<Scalar>::Int Int __attribute__((vector_size(kBytes)));
};

// GCC's vector types have neither fma nor sqrt: one overload for each register the ISA has, and a
// loop for those it has not.
template <typename Vec>
SES_INLINE Vec fma(Vec a, Vec b, Vec sum) {
  return a * b + sum;
}

SES_INLINE float sqrt(float a) { return __builtin_sqrtf(a); }
SES_INLINE double sqrt(double a) { return __builtin_sqrt(a); }

template <typename Vec>
SES_INLINE Vec sqrt(Vec a) {
  for (unsigned i = 0; i < sizeof(Vec) / sizeof(a[0]); ++i) a[i] = sqrt(a[i]);
  return a;
}

#if defined(__SSE2__)
SES_INLINE __m128 sqrt(__m128 a) { return _mm_sqrt_ps(a); }
SES_INLINE __m128d sqrt(__m128d a) { return _mm_sqrt_pd(a); }
#endif
#if defined(__FMA__)
SES_INLINE __m128 fma(__m128 a, __m128 b, __m128 sum) { return _mm_fmadd_ps(a, b, sum); }
SES_INLINE __m128d fma(__m128d a, __m128d b, __m128d sum) { return _mm_fmadd_pd(a, b, sum); }
SES_INLINE __m256 fma(__m256 a, __m256 b, __m256 sum) { return _mm256_fmadd_ps(a, b, sum); }
SES_INLINE __m256d fma(__m256d a, __m256d b, __m256d sum) { return _mm256_fmadd_pd(a, b, sum); }
SES_INLINE __m256 sqrt(__m256 a) { return _mm256_sqrt_ps(a); }
SES_INLINE __m256d sqrt(__m256d a) { return _mm256_sqrt_pd(a); }
#endif
#if defined(__AVX512F__)
SES_INLINE __m512 fma(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }
SES_INLINE __m512d fma(__m512d a, __m512d b, __m512d sum) { return _mm512_fmadd_pd(a, b, sum); }
SES_INLINE __m512 sqrt(__m512 a) { return _mm512_maskz_sqrt_ps(0xffff, a); }
SES_INLINE __m512d sqrt(__m512d a) { return _mm512_maskz_sqrt_pd(0xff, a); }
#endif

// kUnroll registers side by side: independent chains hide the latency of sqrt and division, which
// is what small matrices wait for.
template <typename Element, int kBytes, int kUnroll>
struct PackOf {
  using Scalar = Element;
  using Vec = typename Register<Scalar, kBytes>::Vec;
  using Int = typename Register<Scalar, kBytes>::Int;
  static constexpr int kLanes = kUnroll * kBytes / static_cast<int>(sizeof(Scalar));
  struct Mask {
    Int r[kUnroll];
  };
  Vec r[kUnroll];

  SES_INLINE PackOf broadcast(Scalar x) {
    PackOf y;
    // x - 0 is x for every x, x + 0 is not: only this needs no arithmetic
    for (int i = 0; i < kUnroll; ++i) y.r[i] = x - Vec{};
    return y;
  }
  SES_INLINE PackOf iota() {
    PackOf y;
    for (int i = 0; i < kLanes; ++i) y.r[i * kUnroll / kLanes][i % (kLanes / kUnroll)] = Scalar(i);
    return y;
  }
  SES_INLINE bool any(Mask mask) {
    Int all = mask.r[0];
    for (int i = 1; i < kUnroll; ++i) all |= mask.r[i];
    typename ScalarTraits<Scalar>::Int bits = 0;
    for (int i = 0; i < kLanes / kUnroll; ++i) bits |= all[i];
    return bits != 0;
  }
};

// A cache line.
template <typename Scalar>
using Line = PackOf<Scalar, kRegisterBytes, 64 / kRegisterBytes>;

#define SES_PACK template <typename Scalar, int kBytes, int kUnroll>
#define SES_EACH for (int i = 0; i < kUnroll; ++i)

#define SES_ARITHMETIC(op)                                                                  \
  SES_PACK SES_INLINE PackOf<Scalar, kBytes, kUnroll> operator op(                          \
      const PackOf<Scalar, kBytes, kUnroll>& a, const PackOf<Scalar, kBytes, kUnroll>& b) { \
    PackOf<Scalar, kBytes, kUnroll> y;                                                      \
    SES_EACH y.r[i] = a.r[i] op b.r[i];                                                     \
    return y;                                                                               \
  }
SES_ARITHMETIC(+)
SES_ARITHMETIC(-)
SES_ARITHMETIC(*)
SES_ARITHMETIC(/)
#undef SES_ARITHMETIC

#define SES_COMPARE(op)                                                                     \
  SES_PACK SES_INLINE typename PackOf<Scalar, kBytes, kUnroll>::Mask operator op(           \
      const PackOf<Scalar, kBytes, kUnroll>& a, const PackOf<Scalar, kBytes, kUnroll>& b) { \
    typename PackOf<Scalar, kBytes, kUnroll>::Mask mask;                                    \
    SES_EACH mask.r[i] = a.r[i] op b.r[i];                                                  \
    return mask;                                                                            \
  }
SES_COMPARE(<)
SES_COMPARE(<=)
SES_COMPARE(==)
SES_COMPARE(!=)
#undef SES_COMPARE

// A Mask is a nested type and cannot be deduced: the pack it came from is named.
template <typename Pack>
SES_INLINE typename Pack::Mask both(typename Pack::Mask a, typename Pack::Mask b) {
  for (auto i = 0u; i < sizeof(a.r) / sizeof(a.r[0]); ++i) a.r[i] &= b.r[i];
  return a;
}

SES_PACK SES_INLINE PackOf<Scalar, kBytes, kUnroll> select(
    const typename PackOf<Scalar, kBytes, kUnroll>::Mask& mask,
    const PackOf<Scalar, kBytes, kUnroll>& a, const PackOf<Scalar, kBytes, kUnroll>& b) {
  PackOf<Scalar, kBytes, kUnroll> y;
  SES_EACH y.r[i] = mask.r[i] ? a.r[i] : b.r[i];
  return y;
}

// a * b + sum
SES_PACK SES_INLINE PackOf<Scalar, kBytes, kUnroll> fma(
    const PackOf<Scalar, kBytes, kUnroll>& a, const PackOf<Scalar, kBytes, kUnroll>& b,
    const PackOf<Scalar, kBytes, kUnroll>& sum) {
  PackOf<Scalar, kBytes, kUnroll> y;
  SES_EACH y.r[i] = fma(a.r[i], b.r[i], sum.r[i]);
  return y;
}

// sum - a * b
SES_PACK SES_INLINE PackOf<Scalar, kBytes, kUnroll> fnma(
    const PackOf<Scalar, kBytes, kUnroll>& a, const PackOf<Scalar, kBytes, kUnroll>& b,
    const PackOf<Scalar, kBytes, kUnroll>& sum) {
  PackOf<Scalar, kBytes, kUnroll> y;
  SES_EACH y.r[i] = fma(-a.r[i], b.r[i], sum.r[i]);
  return y;
}

SES_PACK SES_INLINE PackOf<Scalar, kBytes, kUnroll> sqrt(const PackOf<Scalar, kBytes, kUnroll>& a) {
  PackOf<Scalar, kBytes, kUnroll> y;
  SES_EACH y.r[i] = sqrt(a.r[i]);
  return y;
}

SES_PACK SES_INLINE PackOf<Scalar, kBytes, kUnroll> abs(const PackOf<Scalar, kBytes, kUnroll>& a) {
  using Pack = PackOf<Scalar, kBytes, kUnroll>;
  Pack y;
  SES_EACH y.r[i] =
      (typename Pack::Vec)((typename Pack::Int)a.r[i] & ~ScalarTraits<Scalar>::kSignBit);
  return y;
}

// |a| with the sign of b
SES_PACK SES_INLINE PackOf<Scalar, kBytes, kUnroll> copysign(
    const PackOf<Scalar, kBytes, kUnroll>& a, const PackOf<Scalar, kBytes, kUnroll>& b) {
  using Pack = PackOf<Scalar, kBytes, kUnroll>;
  Pack y;
  SES_EACH y.r[i] =
      (typename Pack::Vec)(((typename Pack::Int)a.r[i] & ~ScalarTraits<Scalar>::kSignBit) |
                           ((typename Pack::Int)b.r[i] & ScalarTraits<Scalar>::kSignBit));
  return y;
}

#undef SES_EACH
#undef SES_PACK

}  // namespace SES_ISA
}  // namespace ses
