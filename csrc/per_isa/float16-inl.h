// float16 and bfloat16, widened to floats and rounded to nearest, ties to even, a register at a
// time. A processor told to flush subnormal numbers widens and rounds to the same bits.
#pragma once

#include "simd-inl.h"

namespace ses {
namespace SES_ISA {

struct Float16 {
  unsigned short bits;
};
struct Bfloat16 {
  unsigned short bits;
};

// What a vector of them is made of.
template <typename Stored>
struct ElementOf {
  using Type = Stored;
};
template <>
struct ElementOf<Float16> {
  using Type = unsigned short;
};
template <>
struct ElementOf<Bfloat16> {
  using Type = unsigned short;
};

template <int kLanes>
struct VectorsOf {
  typedef unsigned short Shorts __attribute__((vector_size(2 * kLanes)));
  typedef int Ints __attribute__((vector_size(4 * kLanes)));
  typedef unsigned Unsigned __attribute__((vector_size(4 * kLanes)));
  typedef float Floats __attribute__((vector_size(4 * kLanes)));
};

template <typename Shorts, typename Vectors = VectorsOf<sizeof(Shorts) / 2>>
SES_INLINE typename Vectors::Floats to_floats(Bfloat16, Shorts bits) {
  using Floats = typename Vectors::Floats;
#if defined(__AVX2__)  // GCC would widen one half after the other, and join them
  if constexpr (sizeof(bits) == sizeof(__m128i))
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
  if constexpr (sizeof(bits) == sizeof(long long))
    return (Floats)_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_cvtsi64_si128((long long)bits)), 16);
#endif
  return (Floats)(__builtin_convertvector(bits, typename Vectors::Unsigned) << 16);
}

template <typename Floats, typename Vectors = VectorsOf<sizeof(Floats) / 4>>
SES_INLINE typename Vectors::Shorts from_floats(Bfloat16, Floats x) {
  using Unsigned = typename Vectors::Unsigned;
  const Unsigned bits = (Unsigned)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Unsigned result = x != x ? rounded * 0 + 0x7fc0 : rounded;
  return __builtin_convertvector(result, typename Vectors::Shorts);
}

template <typename Shorts, typename Vectors = VectorsOf<sizeof(Shorts) / 2>>
SES_INLINE typename Vectors::Floats to_floats(Float16, Shorts bits) {
  using Floats = typename Vectors::Floats;
#if defined(__AVX512F__)
  if constexpr (sizeof(bits) == sizeof(__m256i))
    return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
#endif
#if defined(__F16C__)
  if constexpr (sizeof(bits) == sizeof(__m128i)) return (Floats)_mm256_cvtph_ps((__m128i)bits);
  if constexpr (sizeof(bits) == sizeof(long long))
    return (Floats)_mm_cvtph_ps(_mm_cvtsi64_si128((long long)bits));
#endif
  using Ints = typename Vectors::Ints;
  const Ints wide = __builtin_convertvector(bits, Ints), magnitude = wide & 0x7fff;
  constexpr int kBias = (127 - 15) << 23;
  const Ints normal = (magnitude << 13) + kBias;
  const Ints subnormal = (Ints)(__builtin_convertvector(magnitude, Floats) * 0x1p-24f);
  const Ints finite = magnitude < 0x0400 ? subnormal : normal;
  const Ints result = magnitude < 0x7c00 ? finite : normal + kBias;
  return (Floats)(result | (wide & 0x8000) << 16);
}

template <typename Floats, typename Vectors = VectorsOf<sizeof(Floats) / 4>>
SES_INLINE typename Vectors::Shorts from_floats(Float16, Floats x) {
  using Shorts = typename Vectors::Shorts;
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == sizeof(__m512))
    return (Shorts)_mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT);
#endif
#if defined(__F16C__)
  if constexpr (sizeof(x) == sizeof(__m256))
    return (Shorts)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  if constexpr (sizeof(x) == sizeof(__m128))
    return (Shorts)_mm_cvtsi128_si64(_mm_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#endif
  using Unsigned = typename Vectors::Unsigned;
  const Unsigned bits = (Unsigned)x, magnitude = bits & 0x7fffffff, none = {};
  const Unsigned normal = (magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // An addition that rounds to a multiple of 2^-24, the least subnormal number
  const Floats size = (Floats)magnitude;
  const Unsigned subnormal = (Unsigned)(size + 0.5f) - 0x3f000000;
  const Unsigned finite = size < 0x1p-14f ? subnormal : normal;
  const Unsigned large = x != x ? none + 0x7e00 : none + 0x7c00;
  const Unsigned result = size < 65520.0f ? finite : large;
  return __builtin_convertvector(result | (bits >> 16 & 0x8000), Shorts);
}

}  // namespace SES_ISA
}  // namespace ses
