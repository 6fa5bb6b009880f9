// invert() of sweep.h for matrices that registers do not hold: the tiles stay in memory, and pass
// through the registers for kPivots pivots at a time.
#pragma once

#include "sweep.h"

namespace ses {
namespace sweep {

// Pivots a pass over the tiles in memory takes at once: more of them save memory traffic and cost
// shared memory, [kPivots, n] floats.
constexpr int kPivots = 24;

// Floats of shared memory of invert_packed().
template <int kTile>
constexpr int kInvertPackedFloats = kPivots * kStride<kTile>;

// Rows first, first + 1, ... of a packed matrix to shared memory. What lies left of the diagonal is
// dense, what lies below it is kTile floats of each row.
template <int kTile, typename Group>
SES_DEVICE_INLINE void load_pivots(const Group& group, const float* a, int first, int n,
                                   float* shared) {
  const int rank = group.thread_rank(), threads = group.num_threads();
  const int side = tiles_a_side<kTile>(n);
  for (int k = first / kTile; k < (first + kPivots) / kTile && k < side; ++k) {
    float* rows = shared + (k * kTile - first) * kStride<kTile>;
    for (int p = 0; p < kTile; ++p)
      for (int i = rank; i < (k + 1) * kTile; i += threads)
        rows[p * kStride<kTile> + i] = a[packed_row<kTile>(k * kTile + p) + i];
    for (int e = rank + (k + 1) * kTile * kTile; e < side * kTile * kTile; e += threads) {
      const int i = e / kTile, p = e % kTile;
      rows[p * kStride<kTile> + i] = a[packed_row<kTile>(i) + k * kTile + p];
    }
  }
}

// Makes of these rows what each will be when its turn as the pivot comes, and puts its 1 / d behind
// it: every thread sweeps at most kColumnsEach columns of them, in registers.
template <int kTile, int kColumnsEach, typename Group>
SES_DEVICE_INLINE void sweep_pivots(const Group& group, int first, int n, float shift,
                                    float* shared) {
  const int rank = group.thread_rank(), threads = group.num_threads();
  float x[kColumnsEach][kPivots];  // [.][p]: entry rank + . * threads of row first + p
  SES_UNROLL
  for (int s = 0; s < kColumnsEach; ++s) {
    SES_UNROLL
    for (int p = 0; p < kPivots; ++p)
      if (rank + s * threads < n && first + p < n)
        x[s][p] = shared[p * kStride<kTile> + rank + s * threads];
  }
  SES_UNROLL
  for (int p = 0; p < kPivots; ++p) {
    const int pivot = first + p;
    float* r = shared + p * kStride<kTile>;
    if (pivot < n) {
      SES_UNROLL
      for (int s = 0; s < kColumnsEach; ++s)
        if (rank + s * threads < n) r[rank + s * threads] = x[s][p];
      group.sync();
      const float inverse = inverse_of(r[pivot] + shift);
      SES_UNROLL
      for (int ahead = p / kTile; ahead < kPivots / kTile; ++ahead) {
        const int tile = first / kTile + ahead;
        if (tile * kTile < n) {
          alignas(16) float column[kTile];
          copy<kTile>(r + tile * kTile, column);
          SES_UNROLL
          for (int s = 0; s < kColumnsEach; ++s) {
            const int i = rank + s * threads;
            if (i < n) {
              // Of (i, j) and (j, i) the one in the lower triangle of tiles: its digits.
              const bool lower = i / kTile > tile;
              const float ri = i == pivot ? -1.0f : x[s][p];
              const float here = lower ? ri : ri * inverse, there = lower ? inverse : 1.0f;
              SES_UNROLL
              for (int c = 0; c < kTile; ++c) {
                const int later = ahead * kTile + c;
                if (later > p)
                  x[s][later] = fmaf(-here, column[c] * there, i == pivot ? 0.0f : x[s][later]);
              }
            }
          }
        }
      }
    }
  }
  group.sync();
  for (int p = rank; p < kPivots; p += threads) {
    const bool inside = first + p < n;  // a row that pads the last tile changes nothing
    float* r = shared + p * kStride<kTile>;
    r[kInverse<kTile>] = inside ? inverse_of(r[first + p] + shift) : 0.0f;
    if (inside) r[first + p] = -1.0f;
    // The rows and columns whose turn is still to come in this tile would lose what they gained.
    for (int later = p + 1; later % kTile != 0; ++later) r[first + later] = 0.0f;
  }
  group.sync();
}

// The same as invert(), digit for digit, of a packed matrix in memory that the group shares: tiles
// pass through the registers, kPivots pivots at a time.
template <int kTile, int kColumnsEach, typename Group>
SES_DEVICE_INLINE void invert_packed(const Group& group, float* a, int n, Shift shift,
                                     float* shared) {
  static_assert(kPivots % kTile == 0, "a pass takes whole tiles");
  for (int first = 0; first < n; first += kPivots) {
    group.sync();
    load_pivots<kTile>(group, a, first, n, shared);
    group.sync();
    sweep_pivots<kTile, kColumnsEach>(group, first, n, shift.before, shared);
    for (int t = group.thread_rank(); t < tile_count<kTile>(n); t += group.num_threads()) {
      Tile<kTile> tile = tile_at<kTile>(t);
      fetch(a, tile);
      for (int k = first / kTile; k < (first + kPivots) / kTile && k * kTile < n; ++k) {
        if (tile.row == k || tile.column == k) {
          SES_UNROLL
          for (int i = 0; i < kTile; ++i) {
            SES_UNROLL
            for (int j = 0; j < kTile; ++j) tile.a[i][j] = 0.0f;
            if (tile.row == tile.column) tile.a[i][i] = shift.after;
          }
        }
        SES_ROLL
        for (int p = 0; p < kTile; ++p) {
          const float* r = shared + (k * kTile + p - first) * kStride<kTile>;
          const RankOne<kTile> update(tile, r, r[kInverse<kTile>]);
          SES_UNROLL
          for (int i = 0; i < kTile; ++i) {
            SES_UNROLL
            for (int j = 0; j < kTile; ++j) update.apply(tile, i, j);
          }
        }
      }
      put(tile, a);
    }
  }
  group.sync();
}

}  // namespace sweep
}  // namespace ses
