// Matrices in panels, eight columns wide and one row a pack, and the product of two of them one
// register tile at a time.
//
// Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication (ACM TOMS 34, 2008):
// both factors lie in the order in which the tile reads them.
#pragma once

#include "arrangement.h"
#include "float16-inl.h"
#include "simd-inl.h"

namespace ses {
namespace SES_ISA {

// As many sums as the registers hold beside one row of the right factor.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTilePanels = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kTilePanels = 1;
#else
constexpr int kTileRows = 2, kTilePanels = 1;
#endif
static_assert(kPanelColumns % kTileRows == 0, "a block is a whole number of register tiles");

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

// Registers of Stored to the numbers of Vec, and back.
template <typename Vec, typename Stored, typename In>
SES_INLINE Vec decode(In x) {
  if constexpr (sizeof(Stored) == 2)
    return widen<Vec>(to_floats(Stored(), x));
  else
    return widen<Vec>(x);
}
template <typename Out, typename Stored, typename Vec>
SES_INLINE Out encode(Vec x) {
  if constexpr (sizeof(Stored) == 2) {
    typedef float Floats __attribute__((vector_size(2 * sizeof(Out))));
    return from_floats(Stored(), __builtin_convertvector(x, Floats));
  } else {
    return __builtin_convertvector(x, Out);
  }
}

template <typename Pack, typename Stored>
struct StoredAs {
  static constexpr int kPerRegister = sizeof(typename Pack::Vec) / sizeof(typename Pack::Scalar);
  static constexpr int kRegisters = Pack::kLanes / kPerRegister;
  using Element = typename ElementOf<Stored>::Type;
  typedef Element Vec __attribute__((vector_size(kPerRegister * sizeof(Element))));
};

// As many numbers as there are lanes, converted to Pack's.
template <typename Pack, typename Stored>
SES_INLINE Pack load(const Stored* x) {
  using As = StoredAs<Pack, Stored>;
  Pack y;
  for (int i = 0; i < As::kRegisters; ++i) {
    typename As::Vec in;
    __builtin_memcpy(&in, x + i * As::kPerRegister, sizeof(in));
    y.r[i] = decode<typename Pack::Vec, Stored>(in);
  }
  return y;
}
template <typename Pack, typename Stored>
SES_INLINE void store(const Pack& y, Stored* out) {
  using As = StoredAs<Pack, Stored>;
  for (int i = 0; i < As::kRegisters; ++i) {
    const auto rounded = encode<typename As::Vec, Stored>(y.r[i]);
    __builtin_memcpy(out + i * As::kPerRegister, &rounded, sizeof(rounded));
  }
}

// At the end of a row: the first `count` numbers, at least one, and 0 in the lanes beyond. Out of
// line, so that the loops stay short. Numbers of 16 bits are read by twos, which AVX2 can mask.
template <typename Pack, typename Stored>
__attribute__((noinline)) static Pack load_part(const Stored* x, long count) {
  Stored padded[Pack::kLanes];
  if constexpr (sizeof(Stored) == 2) {
    typedef unsigned Two __attribute__((may_alias, aligned(2)));
    const Stored last[2] = {x[count - 1], {}};
    Two odd;
    __builtin_memcpy(&odd, last, sizeof(odd));
    const Two* from = reinterpret_cast<const Two*>(x);
    Two* to = reinterpret_cast<Two*>(padded);
    for (int i = 0; i < Pack::kLanes / 2; ++i)
      to[i] = 2 * i + 1 < count ? from[i] : 2 * i < count ? odd : 0;
  } else {
    for (int i = 0; i < Pack::kLanes; ++i) padded[i] = i < count ? x[i] : 0;
  }
  return load<Pack>(padded);
}
template <typename Pack, typename Stored>
__attribute__((noinline)) static void store_part(const Pack& y, Stored* out, long count) {
  Stored padded[Pack::kLanes];
  store(y, padded);
  for (int i = 0; i < count; ++i) out[i] = padded[i];
}

// The same in one instruction, where the pack is one register.
#if defined(__AVX512F__)
template <typename Pack, typename Stored>
SES_INLINE Pack load_masked(const Stored* x, unsigned mask) {
  using Vec = typename Pack::Vec;
  typedef unsigned short Shorts __attribute__((vector_size(2 * Pack::kLanes)));
  if constexpr (sizeof(Stored) == sizeof(double))
    return {{_mm512_maskz_loadu_pd(mask, x)}};
  else if constexpr (sizeof(Stored) == sizeof(float) && Pack::kLanes == 16)
    return {{_mm512_maskz_loadu_ps(mask, x)}};
  else if constexpr (sizeof(Stored) == sizeof(float))
    return {{widen<Vec>(_mm256_maskz_loadu_ps(mask, x))}};
  else if constexpr (Pack::kLanes == 16)
    return {{decode<Vec, Stored>((Shorts)_mm256_maskz_loadu_epi16(mask, x))}};
  else
    return {{decode<Vec, Stored>((Shorts)_mm_maskz_loadu_epi16(mask, x))}};
}
template <typename Pack, typename Stored>  // y by value: a reference crashes GCC 12 at -O1
SES_INLINE void store_masked(Pack y, Stored* out, unsigned mask) {
  typedef unsigned short Shorts __attribute__((vector_size(2 * Pack::kLanes)));
  if constexpr (sizeof(Stored) == sizeof(double))
    _mm512_mask_storeu_pd(out, mask, y.r[0]);
  else if constexpr (sizeof(Stored) == sizeof(float) && Pack::kLanes == 16)
    _mm512_mask_storeu_ps(out, mask, y.r[0]);
  else if constexpr (sizeof(Stored) == sizeof(float))
    _mm256_mask_storeu_ps(out, mask, _mm512_maskz_cvtpd_ps(0xff, y.r[0]));
  else if constexpr (Pack::kLanes == 16)
    _mm256_mask_storeu_epi16(out, mask, (__m256i)encode<Shorts, Stored>(y.r[0]));
  else
    _mm_mask_storeu_epi16(out, mask, (__m128i)encode<Shorts, Stored>(y.r[0]));
}
#endif

template <typename Pack, typename Stored>
SES_INLINE Pack load(const Stored* x, long count) {
  if (__builtin_expect(count >= Pack::kLanes, 1)) return load<Pack>(x);
#if defined(__AVX512F__)
  if constexpr (sizeof(Pack) == sizeof(typename Pack::Vec))
    return load_masked<Pack>(x, (1u << count) - 1);
#endif
  return load_part<Pack>(x, count);
}
template <typename Pack, typename Stored>
SES_INLINE void store(const Pack& y, Stored* out, long count) {
  if (__builtin_expect(count >= Pack::kLanes, 1)) return store(y, out);
#if defined(__AVX512F__)
  if constexpr (sizeof(Pack) == sizeof(typename Pack::Vec))
    return store_masked(y, out, (1u << count) - 1);
#endif
  store_part(y, out, count);
}

// Lines asked for ahead of their use; of more than this the cache would lose the first.
constexpr long kPrefetchBytes = 32 << 10;
enum Access { kRead, kWrite };  // as __builtin_prefetch counts them

template <Access kAccess = kRead, typename Stored>
SES_INLINE void prefetch(const Stored* from, long count) {
  const long bytes = count * static_cast<long>(sizeof(Stored));
  if (bytes > kPrefetchBytes) return;
  for (long i = 0; i < bytes; i += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + i, kAccess, 3);
    asm volatile("");  // a function that does nothing else would count as pure, and be left out
  }
}

// f(first, size) for bundles of up to `most` that make up `count` matrices.
template <typename Function>
SES_INLINE void for_bundles(int count, int most, Function f) {
  for (int first = 0; first < count; first += most)
    f(first, count - first < most ? count - first : most);
}

template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};

// f(first panel, Width) for some panels at a time that cover `panels` of them.
template <typename Function>
SES_INLINE void for_widths(int panels, Function f) {
  int panel = 0;
  for (; panel + kTilePanels <= panels; panel += kTilePanels) f(panel, Width<kTilePanels>());
  if (kTilePanels > 2 && panel + 2 == panels) f(panel, Width<2>());
  if (kTilePanels > 1 && panel + 1 == panels) f(panel, Width<1>());
}

template <int kRows, int kWidth, typename Pack>
SES_INLINE void clear(Pack (&sum)[kRows][kWidth]) {
  for (auto& row : sum)
    for (Pack& value : row) value = Pack::broadcast(0);
}

// sum[r][p] = block[p * stride + r], and back
template <int kRows, int kWidth, typename Pack>
SES_INLINE void load_tile(const Pack* block, long stride, Pack (&sum)[kRows][kWidth]) {
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kWidth; ++p) sum[r][p] = block[p * stride + r];
}
template <int kRows, int kWidth, typename Pack>
SES_INLINE void store_tile(const Pack (&sum)[kRows][kWidth], Pack* block, long stride) {
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kWidth; ++p) block[p * stride + r] = sum[r][p];
}

// sum[r][p] += sum over k of left[k * left_stride + r * row_stride] * right[p * right_stride + k]
template <int kRows, int kWidth, typename Pack>
SES_INLINE void multiply_tile(long depth, const typename Pack::Scalar* left, long left_stride,
                              long row_stride, const Pack* right, long right_stride,
                              Pack (&sum)[kRows][kWidth]) {
  for (long k = 0; k < depth; ++k) {
    Pack row[kWidth];
    for (int p = 0; p < kWidth; ++p) row[p] = right[p * right_stride + k];
    for (int r = 0; r < kRows; ++r) {
      const Pack factor = Pack::broadcast(left[k * left_stride + r * row_stride]);
      for (int p = 0; p < kWidth; ++p) sum[r][p] = fma(factor, row[p], sum[r][p]);
    }
  }
}

template <typename Pack>
SES_INLINE typename Pack::Scalar sum_of_lanes(Pack a) {
  typename Pack::Scalar lane[Pack::kLanes];
  __builtin_memcpy(lane, &a, sizeof(lane));
  for (int width = Pack::kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SES_SHUFFLES
#endif
#endif

#if defined(SES_SHUFFLES)

template <int... kLane>
struct Lanes {};
template <int kBytes>
struct LanesOf;
template <>
struct LanesOf<64> : Lanes<0, 1, 2, 3, 4, 5, 6, 7> {};
template <>
struct LanesOf<32> : Lanes<0, 1, 2, 3> {};
template <>
struct LanesOf<16> : Lanes<0, 1> {};

// Of every two neighbouring runs of kRun lanes the first (kWhich = 0) or the second (1): that of a,
// then that of b.
template <int kRun, int kWhich, typename Vec, int... kLane>
SES_INLINE Vec take_runs(Vec a, Vec b, Lanes<kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  return __builtin_shufflevector(
      a, b, (kLane % (2 * kRun) < kRun ? kLane : kLanes + kLane - kRun) + kWhich * kRun...);
}

// The same of packs: whole registers where a run is one or more.
template <int kRun, typename Pack>
SES_INLINE void split_runs(const Pack& a, const Pack& b, Pack& first, Pack& second) {
  constexpr int kRegisters = sizeof(Pack) / sizeof(typename Pack::Vec);
  constexpr int kEach = kRun * kRegisters / Pack::kLanes;  // registers of a run
  if constexpr (kEach == 0) {
    for (int i = 0; i < kRegisters; ++i) {
      first.r[i] = take_runs<kRun, 0>(a.r[i], b.r[i], LanesOf<sizeof(a.r[i])>());
      second.r[i] = take_runs<kRun, 1>(a.r[i], b.r[i], LanesOf<sizeof(a.r[i])>());
    }
  } else {
    for (int i = 0; i < kRegisters; ++i) {
      const bool is_of_b = i / kEach % 2 == 1;
      const int at = is_of_b ? i - kEach : i;
      first.r[i] = is_of_b ? b.r[at] : a.r[at];
      second.r[i] = is_of_b ? b.r[at + kEach] : a.r[at + kEach];
    }
  }
}

// Blocks of eight packs of eight lanes, in three rounds: runs of four, of two, of one.
template <typename Pack>
struct Square {
  // Lane r of the result is sum_of_lanes(rows[r]), to the bit.
  SES_INLINE Pack sums_of_lanes(const Pack* rows) {
    Pack half[4], quarter[2];
    for (int r = 0; r < 4; ++r) half[r] = sum_runs<4>(rows[r], rows[r + 4]);
    for (int r = 0; r < 2; ++r) quarter[r] = sum_runs<2>(half[r], half[r + 2]);
    return sum_runs<1>(quarter[0], quarter[1]);
  }

  // to[c] lane r = from[r] lane c
  SES_INLINE void transpose(const Pack* from, Pack* to) {
    Pack half[8], quarter[4];
    for (int r = 0; r < 4; ++r) split_runs<4>(from[r], from[r + 4], half[r], half[r + 4]);
    for (int s = 0; s < 8; s += 4) {
      for (int r = 0; r < 2; ++r)
        split_runs<2>(half[s + r], half[s + r + 2], quarter[r], quarter[r + 2]);
      for (int r = 0; r < 4; r += 2)
        split_runs<1>(quarter[r], quarter[r + 1], to[s + r], to[s + r + 1]);
    }
  }

 private:
  template <int kRun>
  SES_INLINE Pack sum_runs(const Pack& a, const Pack& b) {
    Pack first, second;
    split_runs<kRun>(a, b, first, second);
    return first + second;
  }
};

#else

// Blocks of eight packs of eight lanes, through memory: this compiler cannot be told how to
// shuffle registers.
template <typename Pack>
struct Square {
  using Scalar = typename Pack::Scalar;

  // Lane r of the result is sum_of_lanes(rows[r]), to the bit.
  SES_INLINE Pack sums_of_lanes(const Pack* rows) {
    Scalar sum[kPanelColumns];
    for (int r = 0; r < kPanelColumns; ++r) sum[r] = sum_of_lanes(rows[r]);
    Pack result;
    __builtin_memcpy(&result, sum, sizeof(result));
    return result;
  }

  // to[c] lane r = from[r] lane c
  SES_INLINE void transpose(const Pack* from, Pack* to) {
    Scalar in[kPanelColumns][kPanelColumns], out[kPanelColumns][kPanelColumns];
    __builtin_memcpy(in, from, sizeof(in));
    for (int r = 0; r < kPanelColumns; ++r)
      for (int c = 0; c < kPanelColumns; ++c) out[c][r] = in[r][c];
    __builtin_memcpy(to, out, sizeof(out));
  }
};

#endif

// Block (row, column) of a symmetric matrix and its mirror image, to out [n, n].
template <typename Pack, typename Stored>
SES_INLINE void store_symmetric(const Pack* block, int row, int column, int n, Stored* out) {
  auto store_block = [&](const Pack* from, int top, int left) {
    for (int r = 0; r < kPanelColumns && top + r < n; ++r)
      store(from[r], out + static_cast<long>(top + r) * n + left, n - left);
  };
  store_block(block, row, column);
  if (row == column) return;
  Pack mirrored[kPanelColumns];
  Square<Pack>::transpose(block, mirrored);
  store_block(mirrored, column, row);
}

}  // namespace SES_ISA
}  // namespace ses
