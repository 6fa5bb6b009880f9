// F = Q F Q^T for the reflections of tridiagonal_panels-inl.h, a block of eight at a time in
// compact WY form (Schreiber and Van Loan, SIAM J. Sci. Stat. Comput. 10, 1989).
#pragma once

#include "group.h"
#include "panels-inl.h"
#include "simd-inl.h"
#include "tile-inl.h"

namespace ses {
namespace SES_ISA {

// Steps 8 k + j of the tridiagonalisation, j = 0 .. 7, as one reflection. Each takes F to H_j F H_j
// with H_j = I - h_j u_j u_j^T, h_j its inverse_h, in ascending order. With V = (u_0 .. u_7),
//
//   H_7 .. H_0 = I - V S V^T, S lower triangular, row by row: if that holds without H_j, then
//   H_j (I - V S V^T) = I - V S V^T - u_j h_j (u_j^T - u_j^T V S V^T),
//   so that row j of S is h_j (e_j^T - (V^T V)_j S), from the rows before it.
//
//   (I - V S V^T) F (I - V S V^T)^T
//     = F - V S Y^T - Y S^T V^T + V X V^T    Y = F V, X = S (V^T Y) S^T, as symmetric as F
//     = F - V W^T - W V^T                    W = Y S^T - V X / 2
//
// What lies where, for one k (r a row, c a panel of columns; u_j is 0 in the panels after k):
//
//   V [n, 8]     v_row[r]            copied from V^T by each thread
//   V^T [8, n]   a[c][8 k + j]       where the tridiagonalisation left it
//   Y [n, 8]     y_row[r]            what the blocks of F left of the diagonal give as they stand,
//                                    then the whole
//   Y^T [8, n]   y_part[part][c][j]  what those of a part's rows give mirrored, and those on it
//                y_share[thread]     their sum over a thread's parts
//                y_column[c][j]      the whole
//   -W^T [8, n]  w_column[c][j]
//   V^T V, V^T Y, S, X [8, 8]        gram, z, s and (halved) x of second_factor;
//                                    the first two also by part

// A row of blocks of F: F -= V W^T + W V^T for block k.
template <typename Pack>
SES_INLINE void update_row(const PanelWorkspace<Pack>& work, int k, int b) {
  using Scalar = typename Pack::Scalar;
  const Pack* v_column = work.at(work.a, 0, k * kPanelColumns);  // [panels, part_rows], as f
  Pack* f = work.at(work.f, 0, b * kPanelColumns);
  for_widths(b < k ? b + 1 : k + 1, [&](int c, auto width) {
    constexpr int kWidth = decltype(width)::value;
    for (int j = 0; j < kPanelColumns; j += kTileRows) {
      Pack* out = f + c * work.part_rows + j;
      Pack sum[kTileRows][kWidth];
      load_tile(out, work.part_rows, sum);
      if (b <= k)
        multiply_tile(kPanelColumns,
                      reinterpret_cast<const Scalar*>(v_column + b * work.part_rows) + j,
                      kPanelColumns, 1, work.w_column + c * kPanelColumns, kPanelColumns, sum);
      multiply_tile(kPanelColumns,
                    reinterpret_cast<const Scalar*>(work.w_column + b * kPanelColumns) + j,
                    kPanelColumns, 1, v_column + c * work.part_rows, work.part_rows, sum);
      store_tile(sum, out, work.part_rows);
    }
  });
}

// What a row of blocks of F adds to Y = F V of block k: each block stands for its mirror image too.
template <typename Pack>
SES_INLINE void multiply_row(const PanelWorkspace<Pack>& work, int k, int b, const Pack* v_row,
                             Pack* y_part) {
  using Scalar = typename Pack::Scalar;
  const Pack* f = work.at(work.f, 0, b * kPanelColumns);  // [panels, part_rows]
  Pack* y_row = work.at_row(work.y_row, b * kPanelColumns);
  if (b <= k) {
    for_widths(b + 1, [&](int c, auto width) {
      constexpr int kWidth = decltype(width)::value;
      for (int j = 0; j < kPanelColumns; j += kTileRows) {
        Pack sum[kTileRows][kWidth];
        Pack* out = y_part + c * kPanelColumns + j;
        load_tile(out, kPanelColumns, sum);
        multiply_tile(kPanelColumns, reinterpret_cast<const Scalar*>(v_row + b * kPanelColumns) + j,
                      kPanelColumns, 1, f + c * work.part_rows, work.part_rows, sum);
        store_tile(sum, out, kPanelColumns);
      }
    });
  }
  const int panels = b <= k ? b : k + 1;
  for (int j = 0; j < kPanelColumns; j += kTileRows) {
    Pack sum[kTileRows][1];
    clear(sum);
    for (int c = 0; c < panels; ++c)
      multiply_tile(kPanelColumns, reinterpret_cast<const Scalar*>(f + c * work.part_rows + j), 1,
                    kPanelColumns, v_row + c * kPanelColumns, 0, sum);
    store_tile(sum, y_row + j, 0);
  }
}

// The rows of a part in V^T right, both by row.
template <typename Pack, typename At>
SES_INLINE void multiply_transposed(const PanelWorkspace<Pack>& work, int k, int part,
                                    const Pack* v_row, At right, Pack* product) {
  using Scalar = typename Pack::Scalar;
  for (int j = 0; j < kPanelColumns; j += kTileRows) {
    Pack sum[kTileRows][1];
    clear(sum);
    for_rows(part, work.parts, 0, (k + 1) * kPanelColumns, [&](int begin, int end) {
      multiply_tile(end - begin, reinterpret_cast<const Scalar*>(v_row + begin) + j, kPanelColumns,
                    1, right(begin), 0, sum);
    });
    store_tile(sum, product + j, 0);
  }
}

// Y of a part's rows: y_row and what the threads share each hold what the other lacks. And what
// these rows add to V^T V and V^T Y.
template <typename Pack>
static void finish_product(const PanelWorkspace<Pack>& work, int k, int part, int threads,
                           const Pack* v_row) {
  for_panels(part, work.parts, work.panels, [&](int c) {
    Pack* column = work.at_row(work.y_column, c * kPanelColumns);
    Pack* row = work.at_row(work.y_row, c * kPanelColumns);
    Square<Pack>::transpose(row, column);
    if (c <= k) {
      Pack mirrored[kPanelColumns];
      add_up(threads, work.y_share + c * kPanelColumns, work.y_sums, kPanelColumns, mirrored);
      for (int j = 0; j < kPanelColumns; ++j) column[j] = mirrored[j] + column[j];
    }
    Square<Pack>::transpose(column, row);
  });
  multiply_transposed(
      work, k, part, v_row, [&](int row) { return v_row + row; },
      work.gram_part + part * kPanelColumns);
  multiply_transposed(
      work, k, part, v_row, [&](int row) { return work.at_row(work.y_row, row); },
      work.z_part + part * kPanelColumns);
}

// -W^T = X V^T / 2 - S Y^T, of this thread's parts
template <typename Pack>
static void second_factor(const PanelWorkspace<Pack>& work, int k, const CpuGroup& group) {
  using Scalar = typename Pack::Scalar;
  const Pack zero = Pack::broadcast(0);
  Pack gram[kPanelColumns], s[kPanelColumns], z[kPanelColumns], sz[kPanelColumns], x[kPanelColumns];
  add_up(work.parts, work.gram_part, kPanelColumns, kPanelColumns, gram);
  add_up(work.parts, work.z_part, kPanelColumns, kPanelColumns, z);
  auto entry = [](const Pack& row, int i) {
    return Pack::broadcast(reinterpret_cast<const Scalar*>(&row)[i]);
  };
  for (int j = 0; j < kPanelColumns; ++j) {
    const Pack h = Pack::broadcast(work.inverse_h[k * kPanelColumns + j]);
    Pack sum = zero;
    for (int l = 0; l < j; ++l) sum = fnma(entry(gram[j], l), s[l], sum);
    s[j] = h * select(Pack::iota() == Pack::broadcast(Scalar(j)), Pack::broadcast(1), sum);
  }
  for (int j = 0; j < kPanelColumns; ++j) {
    sz[j] = zero;
    for (int l = 0; l <= j; ++l) sz[j] = fma(entry(s[j], l), z[l], sz[j]);
  }
  Square<Pack>::transpose(sz, z);
  for (int j = 0; j < kPanelColumns; ++j) {
    x[j] = zero;
    for (int l = 0; l <= j; ++l) x[j] = fma(entry(s[j], l), z[l], x[j]);
    x[j] = Pack::broadcast(Scalar(0.5)) * x[j];
  }
  for_own_parts(group, work.parts, [&](int part) {
    for_panels(part, work.parts, work.panels, [&](int c) {
      const Pack* v = work.at(work.a, c, k * kPanelColumns);
      const Pack* y = work.at_row(work.y_column, c * kPanelColumns);
      for (int j = 0; j < kPanelColumns; ++j) {
        Pack sum = zero;
        if (c <= k)
          for (int l = 0; l < kPanelColumns; ++l) sum = fma(entry(x[j], l), v[l], sum);
        for (int l = 0; l <= j; ++l) sum = fnma(entry(s[j], l), y[l], sum);
        work.w_column[c * kPanelColumns + j] = sum;
      }
    });
  });
}

// F = Q F Q^T. Each pass over F applies one block and multiplies by the next. False for a thread
// that is to return.
template <typename Pack>
static bool reflect(const PanelWorkspace<Pack>& work, CpuGroup& group) {
  const int rank = group.thread_rank();
  Pack* v_row = work.v_rows + rank * work.y_sums;
  Pack* y_share = work.y_share + rank * work.y_sums;
  for (int k = -1; k < work.panels; ++k) {
    const int next = k + 1, threads = group.num_threads();
    if (next < work.panels)
      for (int c = 0; c <= next; ++c)
        Square<Pack>::transpose(work.at(work.a, c, next * kPanelColumns),
                                v_row + c * kPanelColumns);
    for_own_parts(group, work.parts, [&](int part) {
      Pack* y_part = work.parts == threads ? y_share : work.y_part + part * work.y_sums;
      if (next < work.panels)
        for (int r = 0; r < (next + 1) * kPanelColumns; ++r) y_part[r] = Pack::broadcast(0);
      for_panels(part, work.parts, work.panels, [&](int b) {
        if (k >= 0) update_row(work, k, b);
        if (next < work.panels) multiply_row(work, next, b, v_row, y_part);
      });
    });
    if (next == work.panels) return true;
    if (work.parts > threads)
      add_up(work.parts / threads, work.y_part + rank * work.y_sums, threads * work.y_sums,
             (next + 1) * kPanelColumns, y_share);
    if (!group.sync()) return false;
    for_own_parts(group, work.parts,
                  [&](int part) { finish_product(work, next, part, threads, v_row); });
    if (!group.sync()) return false;
    second_factor(work, next, group);
    if (!group.sync()) return false;
  }
  return true;
}

}  // namespace SES_ISA
}  // namespace ses
