// Matrices in panels, eight columns wide and one row a pack, and the product of two of them one
// register tile at a time.
//
// Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication (ACM TOMS 34, 2008):
// both factors lie in the order in which the tile reads them.
#pragma once

#include "simd-inl.h"

namespace ses {
namespace SES_ISA {

constexpr int kPanel = 8;  // columns of a panel, rows of a tile

// As many sums as the registers hold beside one row of the right factor.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTilePanels = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kTilePanels = 1;
#else
constexpr int kTileRows = 2, kTilePanels = 1;
#endif
static_assert(kPanel % kTileRows == 0, "a tile is a whole number of register tiles");

// GCC would widen one half after the other, and join them.
template <typename Out, typename In>
SES_INLINE Out widen(In x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Out) == sizeof(__m512d) && sizeof(In) == sizeof(__m256))
    return _mm512_maskz_cvtps_pd(0xff, x);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(Out) == sizeof(__m256d) && sizeof(In) == sizeof(__m128))
    return _mm256_cvtps_pd(x);
#endif
  return __builtin_convertvector(x, Out);
}

// As many numbers as there are lanes, converted to P's.
template <typename P, typename X>
SES_INLINE P load(const X* x) {
  using Vec = typename P::Vec;
  constexpr int kLanes = sizeof(Vec) / sizeof(typename P::Scalar);
  typedef X In __attribute__((vector_size(kLanes * sizeof(X))));
  P y;
  for (unsigned i = 0; i < sizeof(y.r) / sizeof(y.r[0]); ++i) {
    In in;
    __builtin_memcpy(&in, x + i * kLanes, sizeof(in));
    y.r[i] = widen<Vec>(in);
  }
  return y;
}
template <typename P, typename X>
SES_INLINE void store(const P& y, X* out) {
  constexpr int kLanes = sizeof(typename P::Vec) / sizeof(typename P::Scalar);
  typedef X Out __attribute__((vector_size(kLanes * sizeof(X))));
  for (unsigned i = 0; i < sizeof(y.r) / sizeof(y.r[0]); ++i) {
    const Out rounded = __builtin_convertvector(y.r[i], Out);
    __builtin_memcpy(out + i * kLanes, &rounded, sizeof(rounded));
  }
}

// At the end of a row: the first `count` numbers, at least one, and 0 in the lanes beyond. Out of
// line, so that the loops stay short.
template <typename P, typename X>
__attribute__((noinline)) static P load_part(const X* x, long count) {
  X padded[P::kLanes];
  for (int i = 0; i < P::kLanes; ++i) padded[i] = i < count ? x[i] : X(0);
  return load<P>(padded);
}
template <typename P, typename X>
__attribute__((noinline)) static void store_part(const P& y, X* out, long count) {
  X padded[P::kLanes];
  store(y, padded);
  for (int i = 0; i < count; ++i) out[i] = padded[i];
}

// The same in one instruction, where the pack is one register.
#if defined(__AVX512F__)
template <typename P, typename X>
SES_INLINE P load_masked(const X* x, unsigned lanes) {
  P y;
  if constexpr (sizeof(X) == sizeof(double))
    y.r[0] = _mm512_maskz_loadu_pd(lanes, x);
  else if constexpr (P::kLanes == 16)
    y.r[0] = _mm512_maskz_loadu_ps(lanes, x);
  else
    y.r[0] = widen<typename P::Vec>(_mm256_maskz_loadu_ps(lanes, x));
  return y;
}
template <typename P, typename X>  // y by value: a reference crashes GCC 12 at -O1
SES_INLINE void store_masked(P y, X* out, unsigned lanes) {
  if constexpr (sizeof(X) == sizeof(double))
    _mm512_mask_storeu_pd(out, lanes, y.r[0]);
  else if constexpr (P::kLanes == 16)
    _mm512_mask_storeu_ps(out, lanes, y.r[0]);
  else
    _mm256_mask_storeu_ps(out, lanes, _mm512_maskz_cvtpd_ps(0xff, y.r[0]));
}
#endif

template <typename P, typename X>
SES_INLINE P load(const X* x, long count) {
  if (__builtin_expect(count >= P::kLanes, 1)) return load<P>(x);
#if defined(__AVX512F__)
  if constexpr (sizeof(P) == sizeof(typename P::Vec)) return load_masked<P>(x, (1u << count) - 1);
#endif
  return load_part<P>(x, count);
}
template <typename P, typename X>
SES_INLINE void store(const P& y, X* out, long count) {
  if (__builtin_expect(count >= P::kLanes, 1)) return store(y, out);
#if defined(__AVX512F__)
  if constexpr (sizeof(P) == sizeof(typename P::Vec))
    return store_masked(y, out, (1u << count) - 1);
#endif
  store_part(y, out, count);
}

// Lines asked for ahead of their use; of more than this the cache would lose the first.
constexpr long kPrefetchBytes = 32 << 10;
enum Access { kRead, kWrite };  // as __builtin_prefetch counts them

template <Access kAccess = kRead, typename T>
SES_INLINE void prefetch(const T* from, long count) {
  const long bytes = count * static_cast<long>(sizeof(T));
  if (bytes > kPrefetchBytes) return;
  for (long i = 0; i < bytes; i += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + i, kAccess, 3);
    asm volatile("");  // a function that does nothing else would count as pure, and be left out
  }
}

// f(first, size) for groups of up to `most` that make up `count`.
template <typename F>
SES_INLINE void for_groups(int count, int most, F f) {
  for (int first = 0; first < count; first += most)
    f(first, count - first < most ? count - first : most);
}

template <int kPanels>
struct Width {
  static constexpr int value = kPanels;
};

// f(first panel, Width) for groups of panels that cover `panels` of them.
template <typename F>
SES_INLINE void for_widths(int panels, F f) {
  int panel = 0;
  for (; panel + kTilePanels <= panels; panel += kTilePanels) f(panel, Width<kTilePanels>());
  if (kTilePanels > 2 && panel + 2 == panels) f(panel, Width<2>());
  if (kTilePanels > 1 && panel + 1 == panels) f(panel, Width<1>());
}

template <int kRows, int kPanels, typename P>
SES_INLINE void clear(P (&sum)[kRows][kPanels]) {
  for (auto& row : sum)
    for (P& value : row) value = P::broadcast(0);
}

// sum[r][p] = block[p * stride + r], and back
template <int kRows, int kPanels, typename P>
SES_INLINE void load_tile(const P* block, long stride, P (&sum)[kRows][kPanels]) {
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) sum[r][p] = block[p * stride + r];
}
template <int kRows, int kPanels, typename P>
SES_INLINE void store_tile(const P (&sum)[kRows][kPanels], P* block, long stride) {
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) block[p * stride + r] = sum[r][p];
}

// sum[r][p] += sum over k of left[k * left_stride + r * row_stride] * right[p * right_stride + k]
template <int kRows, int kPanels, typename P>
SES_INLINE void multiply_tile(long depth, const typename P::Scalar* left, long left_stride,
                              long row_stride, const P* right, long right_stride,
                              P (&sum)[kRows][kPanels]) {
  for (long k = 0; k < depth; ++k) {
    P row[kPanels];
    for (int p = 0; p < kPanels; ++p) row[p] = right[p * right_stride + k];
    for (int r = 0; r < kRows; ++r) {
      const P factor = P::broadcast(left[k * left_stride + r * row_stride]);
      for (int p = 0; p < kPanels; ++p) sum[r][p] = fma(factor, row[p], sum[r][p]);
    }
  }
}

template <typename P>
SES_INLINE typename P::Scalar sum_of_lanes(P a) {
  typename P::Scalar lane[P::kLanes];
  __builtin_memcpy(lane, &a, sizeof(lane));
  for (int width = P::kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// Blocks of eight packs of eight lanes: through memory, and within registers where one holds a pack
// and the compiler can be told how to shuffle it.
template <typename P>
struct Square {
  using T = typename P::Scalar;

  // Lane r of the result is sum_of_lanes(rows[r]), to the bit.
  SES_INLINE P sums_of_lanes(const P* rows) {
    T sum[kPanel];
    for (int r = 0; r < kPanel; ++r) sum[r] = sum_of_lanes(rows[r]);
    P result;
    __builtin_memcpy(&result, sum, sizeof(result));
    return result;
  }

  // to[c] lane r = from[r] lane c
  SES_INLINE void transpose(const P* from, P* to) {
    T in[kPanel][kPanel], out[kPanel][kPanel];
    __builtin_memcpy(in, from, sizeof(in));
    for (int r = 0; r < kPanel; ++r)
      for (int c = 0; c < kPanel; ++c) out[c][r] = in[r][c];
    __builtin_memcpy(to, out, sizeof(out));
  }
};

#if defined(__AVX512F__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
template <>
struct Square<Pack<double, 64, 1>> {
  using P = Pack<double, 64, 1>;
  using V = P::Vec;

  // The halves, quarters and eighths of a and b side by side: three rounds transpose a block.
  SES_INLINE V low4(V a, V b) { return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11); }
  SES_INLINE V high4(V a, V b) { return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15); }
  SES_INLINE V low2(V a, V b) { return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13); }
  SES_INLINE V high2(V a, V b) { return __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15); }
  SES_INLINE V low1(V a, V b) { return __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14); }
  SES_INLINE V high1(V a, V b) { return __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15); }

  SES_INLINE P sums_of_lanes(const P* rows) {
    V half[4], quarter[2];
    for (int r = 0; r < 4; ++r)
      half[r] = low4(rows[r].r[0], rows[r + 4].r[0]) + high4(rows[r].r[0], rows[r + 4].r[0]);
    for (int r = 0; r < 2; ++r)
      quarter[r] = low2(half[r], half[r + 2]) + high2(half[r], half[r + 2]);
    return {{low1(quarter[0], quarter[1]) + high1(quarter[0], quarter[1])}};
  }

  SES_INLINE void transpose(const P* from, P* to) {
    V half[8], quarter[8];
    for (int r = 0; r < 4; ++r) {
      half[r] = low4(from[r].r[0], from[r + 4].r[0]);
      half[r + 4] = high4(from[r].r[0], from[r + 4].r[0]);
    }
    for (int s = 0; s < 8; s += 4)
      for (int r = s; r < s + 2; ++r) {
        quarter[r] = low2(half[r], half[r + 2]);
        quarter[r + 2] = high2(half[r], half[r + 2]);
      }
    for (int r = 0; r < 8; r += 2) {
      to[r].r[0] = low1(quarter[r], quarter[r + 1]);
      to[r + 1].r[0] = high1(quarter[r], quarter[r + 1]);
    }
  }
};
#endif
#endif

// Block (row, column) of a symmetric matrix and its mirror image, to out [n, n].
template <typename P, typename X>
SES_INLINE void store_symmetric(const P* block, int row, int column, int n, X* out) {
  auto store_block = [&](const P* from, int top, int left) {
    for (int r = 0; r < kPanel && top + r < n; ++r)
      store(from[r], out + static_cast<long>(top + r) * n + left, n - left);
  };
  store_block(block, row, column);
  if (row == column) return;
  P mirrored[kPanel];
  Square<P>::transpose(block, mirrored);
  store_block(mirrored, column, row);
}

}  // namespace SES_ISA
}  // namespace ses
