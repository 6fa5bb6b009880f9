// The inverse of a symmetric positive definite matrix, in place, by one group of threads: n steps
// of the symmetric sweep operator (Goodnight, "A Tutorial on the SWEEP Operator", Am. Stat. 33,
// 1979).
//
// With r the pivot row, its pivot d replaced by -1, and row and column k of A set to zero, a step
// is A <- A - r r^T / d. After n of them A is -A^{-1}, and the pivots are those of A = L D L^T: all
// positive if and only if A is positive definite.
//
// Only the lower triangle is kept, as square tiles, each with one thread that updates it and no
// other that reads it: the digits do not depend on the number of threads. Rows and columns that pad
// n to whole tiles are zero and never pivots.
#pragma once

#include <math.h>

#include "eigh.h"
#include "group.h"

// Tiles live in registers only if every loop over their entries is unrolled and every call inlined.
#if defined(__CUDA_ARCH__)
#define SES_UNROLL _Pragma("unroll")
#define SES_ROLL _Pragma("unroll 1")
#define SES_DEVICE_INLINE __host__ __device__ __forceinline__
#else
#define SES_UNROLL
#define SES_ROLL
#define SES_DEVICE_INLINE SES_HOST_DEVICE inline
#endif

namespace ses {
namespace sweep {

// ---- the lower triangle in tiles ----

struct Place {
  int row, column;  // row >= column
};

// Entry t of a lower triangle, counted row by row.
SES_DEVICE_INLINE Place triangle(int t) {
  int row = static_cast<int>((sqrtf(8.0f * static_cast<float>(t) + 1.0f) - 1.0f) / 2.0f);
  if (row * (row + 1) / 2 > t) --row;
  if ((row + 1) * (row + 2) / 2 <= t) ++row;
  return {row, t - row * (row + 1) / 2};
}

template <int kTile>
SES_HOST_DEVICE constexpr int tiles_a_side(int n) {
  return (n + kTile - 1) / kTile;
}

template <int kTile>
SES_HOST_DEVICE constexpr int tile_count(int n) {
  return tiles_a_side<kTile>(n) * (tiles_a_side<kTile>(n) + 1) / 2;
}

// A triangle in memory: rows dense, each padded to whole tiles.
template <int kTile>
SES_HOST_DEVICE constexpr int packed_size(int n) {
  return tile_count<kTile>(n) * kTile * kTile;
}

template <int kTile>
SES_HOST_DEVICE constexpr int packed_row(int i) {
  return kTile * (kTile * (i / kTile * (i / kTile + 1) / 2) + i % kTile * (i / kTile + 1));
}

template <int kTile>
struct Tile {
  int row, column;  // in tiles
  alignas(16) float a[kTile][kTile];
};

template <int kTile>
SES_DEVICE_INLINE Tile<kTile> tile_at(int t) {
  const Place place = triangle(t);
  Tile<kTile> tile;
  tile.row = place.row;
  tile.column = place.column;
  return tile;
}

// Floats that move at once. An aligned struct, which nvcc 11.8, 12.4 and 13.0 all copy by one
// instruction: __builtin_memcpy the first of them takes apart into bytes. It stands for floats of
// any array, hence may_alias.
template <int kTile>
constexpr int kVector = kTile % 4 == 0   ? 4
                        : kTile % 2 == 0 ? 2
                                         : 1;
template <int kTile>
struct alignas(kVector<kTile> * sizeof(float)) [[gnu::may_alias]] Vector {
  float at[kVector<kTile>];
};

// kTile floats from and to memory of that alignment.
template <int kTile>
SES_DEVICE_INLINE void copy(const float* from, float* to) {
  SES_UNROLL
  for (int c = 0; c < kTile; c += kVector<kTile>)
    *reinterpret_cast<Vector<kTile>*>(to + c) = *reinterpret_cast<const Vector<kTile>*>(from + c);
}

// x, but the compiler computes addresses made of it again rather than keep them in registers.
SES_DEVICE_INLINE int forgotten(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

template <int kTile>
SES_DEVICE_INLINE void fetch(const float* packed, Tile<kTile>& tile) {
  const float* from = packed + packed_row<kTile>(tile.row * kTile) + tile.column * kTile;
  SES_UNROLL
  for (int r = 0; r < kTile; ++r) copy<kTile>(from + r * (tile.row + 1) * kTile, tile.a[r]);
}

template <int kTile>
SES_DEVICE_INLINE void put(const Tile<kTile>& tile, float* packed) {
  const int row = forgotten(tile.row), column = forgotten(tile.column);
  float* to = packed + packed_row<kTile>(row * kTile) + column * kTile;
  SES_UNROLL
  for (int r = 0; r < kTile; ++r) copy<kTile>(tile.a[r], to + r * (row + 1) * kTile);
}

// x[0] + ... + x[count - 1] to every thread, pairwise; overwrites x, and is a barrier at both ends.
template <typename Group>
SES_DEVICE_INLINE float sum(const Group& group, float* x, int count) {
  group.sync();
  while (count > 1) {
    const int half = (count + 1) / 2;
    for (int i = group.thread_rank(); i + half < count; i += group.num_threads())
      x[i] += x[i + half];
    group.sync();
    count = half;
  }
  const float total = x[0];
  group.sync();
  return total;
}

// ---- the sweep ----

// Floats from one vector in shared memory to the next, with room for 1 / d: a constant, so that
// addresses take few registers. Neighbouring threads read neighbouring tiles of a vector, and tiles
// of 5, 10 and 12 floats then lie in different banks.
template <int kTile>
constexpr int kMaxSide = kTile == 12 ? 43 : 7;
template <int kTile>
constexpr int kInverse = kMaxSide<kTile> * kTile;
template <int kTile>
constexpr int kStride = kInverse<kTile> + 4;

// What is left out of the diagonal, lest the updates of a matrix near t I vanish in it: entries
// hold A - before I until they have been pivots, -A^{-1} + after I then.
struct Shift {
  float before, after;
};

// 1 / d of a pivot; NaN, which then reaches every sum, if A is not positive definite. One Newton
// step from the hardware's approximation: without the branch of the IEEE division for subnormals.
SES_DEVICE_INLINE float inverse_of(float d) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(d));
  y = fmaf(y, fmaf(-d, y, 1.0f), y);
#else
  const float y = 1.0f / d;
#endif
  return d > 0.0f ? y : NAN;
}

// The tiles of row `pivot` of tile row k write it to r, and 1 / d behind it; row and column become
// zero.
template <int kTile>
SES_DEVICE_INLINE void publish(Tile<kTile>& tile, int k, int pivot, Shift shift, float* r) {
  if (tile.row == k) {
    if (tile.column == k) {
      r[kInverse<kTile>] = inverse_of(tile.a[pivot][pivot] + shift.before);
      tile.a[pivot][pivot] = -1.0f;
    }
    copy<kTile>(tile.a[pivot], r + tile.column * kTile);
    SES_UNROLL
    for (int i = 0; i < kTile; ++i) tile.a[pivot][i] = 0.0f;
  }
  if (tile.column == k) {
    alignas(16) float column[kTile];
    SES_UNROLL
    for (int i = 0; i < kTile; ++i) column[i] = tile.a[i][pivot];
    if (tile.row != k) copy<kTile>(column, r + tile.row * kTile);
    SES_UNROLL
    for (int i = 0; i < kTile; ++i) tile.a[i][pivot] = 0.0f;
    if (tile.row == k) tile.a[pivot][pivot] = shift.after;
  }
}

// Vectors of the rank-one update A - r r^T / d as one tile sees them.
template <int kTile>
struct RankOne {
  alignas(16) float row[kTile], column[kTile];  // r, r / d

  SES_DEVICE_INLINE RankOne(const Tile<kTile>& tile, const float* r, float inverse) {
    copy<kTile>(r + tile.row * kTile, row);
    copy<kTile>(r + tile.column * kTile, column);
    SES_UNROLL
    for (int c = 0; c < kTile; ++c) column[c] *= inverse;
  }
  SES_DEVICE_INLINE void apply(Tile<kTile>& tile, int r, int c) const {
    tile.a[r][c] = fmaf(-row[r], column[c], tile.a[r][c]);
  }
};

// Floats of shared memory of invert().
template <int kTile>
constexpr int kInvertFloats = 2 * kStride<kTile>;

// A <- -A^{-1}, shifted, every tile in the registers of its thread; only the pivot row is shared.
// (A break in an unrolled loop would cost registers.)
template <int kTile, int kSlots, typename Group>
SES_DEVICE_INLINE void invert(const Group& group, Tile<kTile> (&tile)[kSlots], int slots, int n,
                              Shift shift, float* shared) {
  SES_UNROLL
  for (int s = 0; s < kSlots; ++s)
    if (s < slots) publish(tile[s], 0, 0, shift, shared);
  for (int k = 0; k * kTile < n; ++k) {
    SES_UNROLL
    for (int p = 0; p < kTile; ++p) {
      const int pivot = k * kTile + p;
      const int next = (p + 1) % kTile, next_k = k + (p + 1) / kTile;
      if (pivot < n) {
        // The other buffer was last read before the previous barrier: one a step is enough.
        const float* r = shared + pivot % 2 * kStride<kTile>;
        float* next_r = shared + (pivot + 1) % 2 * kStride<kTile>;
        group.sync();
        const float inverse = r[kInverse<kTile>];
        SES_UNROLL
        for (int s = 0; s < kSlots; ++s) {
          if (s < slots) {
            const RankOne<kTile> update(tile[s], r, inverse);
            // The next pivot row depends on none of the rest, which may thus hide its way to the
            // other threads. How far is the compiler's choice: nvcc 13.0 puts two thirds of all
            // multiply-adds before the first store, and in a model of the pipeline of sm_75 a
            // fixed order was no faster.
            SES_UNROLL
            for (int i = 0; i < kTile; ++i) {
              update.apply(tile[s], next, i);
              if (i != next) update.apply(tile[s], i, next);
            }
            publish(tile[s], next_k, next, shift, next_r);
            SES_UNROLL
            for (int i = 0; i < kTile; ++i) {
              SES_UNROLL
              for (int j = 0; j < kTile; ++j)
                if (i != next && j != next) update.apply(tile[s], i, j);
            }
          }
        }
      }
    }
  }
}

}  // namespace sweep
}  // namespace ses
