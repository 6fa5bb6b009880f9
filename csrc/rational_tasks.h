// The rational entropy of a matrix on CUDA, as the tasks that its kernels consist of: sweep_task
// inverts for some of its poles, close_task adds them up, center_task centres the gradient.
//
// With P = K / tr K, S = sum_j w_j (P + t_j I)^{-1} and s = tr(P S), the logarithm of P is constant
// I - S, so that H = -tr(P log P) = s - constant and dH/dK = (S - s I) / tr K. Adding a multiple b
// of I to S adds b to s, and changes neither H, with constant + b for the constant, nor dH/dK: the
// large poles use that.
#pragma once

#include "rational.h"
#include "sweep.h"
#include "sweep_packed.h"

namespace ses {
namespace sweep {

// ---- the work of a launch, passed by value ----

constexpr int kBlockSide = 32;  // M is written, and transposed, in blocks of this side

struct Layer {
  const float* gram;  // [batch, n, n]
  float* h;           // [batch]
  float* m;           // [batch, n, n]; null: entropy alone
  float* slices;      // [batch, splits, packed]: the S of some poles; null: entropy alone
  float* partials;    // [batch, splits]: the s of some poles, NaN if a pivot was not positive
  float* scales;      // [batch]: what the poles were multiplied with; not 1: all in the first slice
  float* working;     // [batch, splits, packed]; null: registers hold the matrix
  float* sums;        // [batch, blocks a side, n]: row sums of M; null: M as it is, not J M J
  int batch, n;
  int chunks;  // tasks that close one matrix
};

constexpr int kMaxLayers = 40;

struct Table {
  Layer layer[kMaxLayers];
  float t[kMaxPoles], w[kMaxPoles];
  float constant;  // less w_j / t_j of the large poles
  int layers, poles;
  int first_large;  // from here on t_j is large: w_j / t_j - w_j / (x + t_j) has more digits
  int splits;       // tasks that share the poles of one matrix
};
static_assert(sizeof(Table) + 8 <= 4096, "the limit of kernel parameters");

enum Kind { kSweep, kRetry, kClose };

SES_DEVICE_INLINE int tasks_of(const Table& table, const Layer& layer, Kind kind) {
  return layer.batch * (kind == kSweep ? table.splits : kind == kRetry ? 1 : layer.chunks);
}

// The layer that task `index` belongs to, counted from that layer's first.
SES_DEVICE_INLINE const Layer& find_layer(const Table& table, Kind kind, int& index) {
  int i = 0;
  while (i < table.layers - 1 && index >= tasks_of(table, table.layer[i], kind))
    index -= tasks_of(table, table.layer[i++], kind);
  return table.layer[i];
}

// ---- P, a row of a tile at a time ----

// P = K * power * inverse: a power of two first, so that no factor overflows.
struct Matrix {
  const float* gram;  // [n, n]
  int n;
  float trace, power, inverse;
};

SES_DEVICE_INLINE bool usable(float trace) { return trace > 0.0f && trace < INFINITY; }

template <typename Group>
SES_DEVICE_INLINE Matrix matrix_of(const Group& group, const float* gram, int n, float* shared) {
  for (int i = group.thread_rank(); i < n; i += group.num_threads()) shared[i] = gram[i * n + i];
  Matrix k{gram, n, sum(group, shared, n), 1.0f, 1.0f};
  if (usable(k.trace)) {
    const int exponent = ilogbf(k.trace);
    k.power = scalbnf(1.0f, exponent < -126 ? 126 : -exponent);
    k.inverse = 1.0f / (k.trace * k.power);
  }
  return k;
}

// P[i, j : j + kTile], zero outside.
template <int kTile>
SES_DEVICE_INLINE void read_row(const Matrix& k, int i, int j, float* x) {
  const float* from = k.gram + i * k.n + j;
  const bool inside = i < k.n && j + kTile <= k.n;
  if (inside && reinterpret_cast<size_t>(from) % alignof(Vector<kTile>) == 0) {
    copy<kTile>(from, x);
  } else {
    SES_UNROLL
    for (int c = 0; c < kTile; ++c) x[c] = i < k.n && j + c < k.n ? from[c] : 0.0f;
  }
  SES_UNROLL
  for (int c = 0; c < kTile; ++c) x[c] = x[c] * k.power * k.inverse;
}

// Adds up weight A in `slice` (packed; null: not wanted), and tr(P A), A symmetric.
template <int kTile>
struct Sums {
  float weight;
  bool first;
  float* slice;
  float twice = 0, once = 0;

  // x = A[i, j : j + kTile]
  SES_DEVICE_INLINE void add_row(const Matrix& k, int i, int j, const float* x) {
    alignas(16) float y[kTile];
    if (slice != nullptr) {
      float* to = slice + packed_row<kTile>(i) + j;
      if (!first) copy<kTile>(to, y);
      SES_UNROLL
      for (int c = 0; c < kTile; ++c) y[c] = fmaf(weight, x[c], first ? 0.0f : y[c]);
      copy<kTile>(y, to);
    }
    read_row<kTile>(k, i, j, y);
    SES_UNROLL
    for (int c = 0; c < kTile; ++c) {
      if (j + c < i) twice = fmaf(x[c], y[c], twice);
      if (j + c == i) once = fmaf(x[c], y[c], once);
    }
  }
  SES_DEVICE_INLINE float trace() const { return fmaf(2.0f, twice, once); }
};

// ---- how a group holds a matrix ----

constexpr int kPitch = kBlockSide + 1;  // of a block in shared memory: no bank conflict in a column

// Shared memory of close_task and center_task, and the threads of a block that runs them.
constexpr int kCloseFloats = kBlockSide * kPitch;
constexpr int kCloseThreads = 256;

template <int kTile_, bool kPacked_, int kMaxN_, int kMaxThreads_>
struct Method {
  static constexpr int kTile = kTile_;
  static constexpr bool kPacked = kPacked_;  // in memory; otherwise in registers, a tile a thread
  static constexpr int kMaxN = kMaxN_, kThreads = kMaxThreads_;
  static constexpr bool kByWarp = kThreads == 32;  // a warp sweeps it, not a block
  // Shared memory of sweep_task.
  static constexpr int kSweepFloats = kPacked ? kInvertPackedFloats<kTile_> : kInvertFloats<kTile_>;

  static_assert(kMaxN <= kMaxSide<kTile> * kTile, "room for a pivot row");
  static_assert(kPacked || tile_count<kTile>(kMaxN) <= kThreads, "a tile a thread");
  static_assert(!kPacked || kMaxN <= 2 * kThreads, "two columns a thread");
  static_assert(tile_count<kTile>(kMaxN) <= kSweepFloats, "room for sums");
  static_assert(kMaxN <= kSweepFloats && 2 * kMaxN <= kCloseFloats, "room for a diagonal");
};

// ---- some poles of a matrix ----

// sum_j w_j (P + t_j I)^{-1} over the poles [first, last), scaled, to `slice` (packed; null: not
// wanted), and the trace of P times it to every thread: NaN if P + t_j I was not positive definite.
template <typename Method, int kSlots, typename Group>
SES_DEVICE_INLINE float sweep_poles(const Group& group, const Matrix& k, const Table& table,
                                    int first, int last, float scale, float* slice, float* working,
                                    float* shared) {
  constexpr int kTile = Method::kTile;
  const int rank = group.thread_rank(), threads = group.num_threads();
  const int tiles = tile_count<kTile>(k.n);
  const int slots = rank < tiles ? (tiles - rank + threads - 1) / threads : 0;
  float total = 0;
  for (int j = first; j < last; ++j) {
    const float pole = scale * table.t[j], weight = scale * table.w[j];
    const Shift shift{pole, j < table.first_large ? 0.0f : 1.0f / pole};
    if constexpr (Method::kPacked) {
      for (int t = rank; t < tiles; t += threads) {
        const Place tile = triangle(t);
        SES_ROLL
        for (int i = tile.row * kTile; i < (tile.row + 1) * kTile; ++i) {
          alignas(16) float x[kTile];
          read_row<kTile>(k, i, tile.column * kTile, x);
          copy<kTile>(x, working + packed_row<kTile>(i) + tile.column * kTile);
        }
      }
      invert_packed<kTile, 2 * kSlots>(group, working, k.n, shift, shared);
      for (int t = rank; t < tiles; t += threads) {
        const Place tile = triangle(t);
        Sums<kTile> sums{-weight, j == first, slice};  // the sweep leaves -A^{-1}
        SES_ROLL
        for (int i = tile.row * kTile; i < (tile.row + 1) * kTile; ++i) {
          alignas(16) float x[kTile];
          copy<kTile>(working + packed_row<kTile>(i) + tile.column * kTile, x);
          sums.add_row(k, i, tile.column * kTile, x);
        }
        shared[t] = -sums.trace();
      }
    } else {
      Tile<kTile> tile[kSlots];
      SES_UNROLL
      for (int s = 0; s < kSlots; ++s) {
        if (s < slots) {
          tile[s] = tile_at<kTile>(rank + s * threads);
          SES_UNROLL
          for (int r = 0; r < kTile; ++r)
            read_row<kTile>(k, tile[s].row * kTile + r, tile[s].column * kTile, tile[s].a[r]);
        }
      }
      invert(group, tile, slots, k.n, shift, shared);
      group.sync();
      SES_UNROLL
      for (int s = 0; s < kSlots; ++s) {
        if (s < slots) {
          Sums<kTile> sums{-weight, j == first, slice};
          const int i = forgotten(tile[s].row) * kTile;
          SES_UNROLL
          for (int r = 0; r < kTile; ++r)
            sums.add_row(k, i + r, tile[s].column * kTile, tile[s].a[r]);
          shared[rank + s * threads] = -sums.trace();
        }
      }
    }
    total = fmaf(weight, sum(group, shared, tiles), total);
  }
  return total;
}

// The s of all poles of a matrix.
SES_DEVICE_INLINE float total_of(const float* partials, int splits) {
  float total = 0;
  for (int split = 0; split < splits; ++split) total += partials[split];
  return total;
}

constexpr float kMaxScale = 16;

// One split of a matrix; or, to retry, all poles of a matrix of which rounding left P + t_1 I
// indefinite: log x = log(x / s) + log s moves every pole to s t_j exactly.
template <typename Method, int kSlots, typename Group>
SES_DEVICE_INLINE void sweep_task(const Group& group, const Table& table, bool retry, int index,
                                  float* shared) {
  const int splits = table.splits;
  const Layer& layer = find_layer(table, retry ? kRetry : kSweep, index);
  const int matrix = retry ? index : index / splits, split = retry ? 0 : index % splits;
  const long slot = static_cast<long>(matrix) * splits + split;
  if (retry && isfinite(total_of(layer.partials + slot, splits))) return;
  const int n = layer.n;
  const Matrix k = matrix_of(group, layer.gram + static_cast<long>(matrix) * n * n, n, shared);
  const long size = packed_size<Method::kTile>(n);
  float* slice = layer.slices == nullptr ? nullptr : layer.slices + slot * size;
  float* working = layer.working == nullptr ? nullptr : layer.working + slot * size;
  const int first = retry ? 0 : split * table.poles / splits;
  const int last = retry ? table.poles : (split + 1) * table.poles / splits;
  float total = NAN, scale = retry ? 4 : 1;
  bool again = usable(k.trace);
  while (again) {
    total =
        sweep_poles<Method, kSlots>(group, k, table, first, last, scale, slice, working, shared);
    again = retry && !isfinite(total) && scale < kMaxScale;
    if (again) scale *= 4;
  }
  if (group.thread_rank() > 0) return;
  layer.partials[slot] = total;
  if (split == 0) layer.scales[matrix] = scale;
}

// ---- H and M ----

SES_HOST_DEVICE constexpr int blocks_a_side(int n) { return (n + kBlockSide - 1) / kBlockSide; }

// m = (S - total I) / tr K, S the sum of the slices, and the sums of its rows within each block
// (null: not wanted): the chunk's share of the blocks.
template <int kTile, typename Group>
SES_DEVICE_INLINE void write_m(const Group& group, const Matrix& k, float total,
                               const float* slices, int splits, int chunk, int chunks, float* m,
                               float* sums, float* shared) {
  const int n = k.n, side = blocks_a_side(n), rank = group.thread_rank();
  const long size = packed_size<kTile>(n);
  for (int b = chunk; b < side * (side + 1) / 2; b += chunks) {
    const Place block = triangle(b);
    const int row = block.row * kBlockSide, column = block.column * kBlockSide;
    for (int e = rank; e < kBlockSide * kBlockSide; e += group.num_threads()) {
      const int r = e / kBlockSide, c = e % kBlockSide, i = row + r, j = column + c;
      if (i >= n || j > i) continue;
      const float* at = slices + packed_row<kTile>(i) + j;
      float x = at[0];
      for (int split = 1; split < splits; ++split) x += at[split * size];
      x = (i == j ? x - total : x) * k.inverse * k.power;
      m[i * n + j] = x;
      shared[r * kPitch + c] = x;
      if (row == column) shared[c * kPitch + r] = x;
    }
    group.sync();
    for (int e = rank; e < kBlockSide * kBlockSide; e += group.num_threads()) {
      const int r = e / kBlockSide, c = e % kBlockSide, i = column + r, j = row + c;
      if (i < j && j < n) m[i * n + j] = shared[c * kPitch + r];
    }
    // Of the block and of its mirror image.
    for (int e = rank; sums != nullptr && e < 2 * kBlockSide; e += group.num_threads()) {
      const bool mirror = e >= kBlockSide;
      const int r = e % kBlockSide, i = (mirror ? column : row) + r;
      const int columns = n - (mirror ? row : column);
      if (i >= n || (mirror && row == column)) continue;
      float x = 0;
      for (int c = 0; c < kBlockSide && c < columns; ++c)
        x += mirror ? shared[c * kPitch + r] : shared[r * kPitch + c];
      sums[(mirror ? block.row : block.column) * n + i] = x;
    }
    group.sync();
  }
}

template <int kTile, typename Group>
SES_DEVICE_INLINE void close_task(const Group& group, const Table& table, int index,
                                  float* shared) {
  const Layer& layer = find_layer(table, kClose, index);
  const int n = layer.n, chunk = index % layer.chunks, matrix = index / layer.chunks;
  const long square = static_cast<long>(n) * n, slot = static_cast<long>(matrix) * table.splits;
  const Matrix k = matrix_of(group, layer.gram + matrix * square, n, shared);
  // No variance: 0. NaN, or not a Gram matrix: NaN.
  float total = k.trace == 0.0f ? 0.0f : NAN, h = total;
  int splits = table.splits;
  if (usable(k.trace)) {
    const float scale = layer.scales[matrix];
    if (scale != 1.0f) splits = 1;
    total = total_of(layer.partials + slot, splits);
    if (isfinite(total)) h = total - (table.constant + logf(scale));
  }
  if (chunk == 0 && group.thread_rank() == 0) layer.h[matrix] = h;
  if (layer.m == nullptr) return;
  float* m = layer.m + matrix * square;
  const int side = blocks_a_side(n);
  float* sums = layer.sums == nullptr ? nullptr : layer.sums + static_cast<long>(matrix) * side * n;
  if (usable(k.trace) && isfinite(total)) {
    const float* slices = layer.slices + slot * packed_size<kTile>(n);
    write_m<kTile>(group, k, total, slices, splits, chunk, layer.chunks, m, sums, shared);
  } else {
    const int start = chunk * group.num_threads() + group.thread_rank();
    const int step = group.num_threads() * layer.chunks;
    for (int i = start; i < square; i += step) m[i] = h;
    for (int i = start; sums != nullptr && i < side * n; i += step) sums[i] = h;
  }
}

// M <- J M J, J = I - 11^T / n: the chunk's share of the rows.
template <typename Group>
SES_DEVICE_INLINE void center_task(const Group& group, const Table& table, int index,
                                   float* shared) {
  const Layer& layer = find_layer(table, kClose, index);
  if (layer.sums == nullptr) return;
  const int n = layer.n, chunk = index % layer.chunks, side = blocks_a_side(n);
  const long matrix = index / layer.chunks;
  const float* sums = layer.sums + matrix * side * n;
  float* m = layer.m + matrix * n * n;
  const int rank = group.thread_rank(), threads = group.num_threads();
  float* mean = shared + n;  // of each row, less half that of all
  for (int i = rank; i < n; i += threads) {
    float x = 0;
    for (int b = 0; b < side; ++b) x += sums[b * n + i];
    shared[i] = mean[i] = x / static_cast<float>(n);
  }
  const float half = sum(group, shared, n) / static_cast<float>(2 * n);
  for (int i = rank; i < n; i += threads) mean[i] -= half;
  group.sync();
  // One after the other, each row by neighbouring threads.
  for (int e = chunk * threads + rank; e < n * n; e += layer.chunks * threads)
    m[e] -= mean[e / n] + mean[e % n];
}

}  // namespace sweep
}  // namespace ses
