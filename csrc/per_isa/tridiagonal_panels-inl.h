// Householder tridiagonalisation of one matrix, whose columns fill the SIMD lanes, as
// householder-inl.h does it for a pack of matrices.
#pragma once

#include "group.h"
#include "panels-inl.h"
#include "simd-inl.h"
#include "tile-inl.h"

namespace ses {
namespace SES_ISA {

// The rows of a part in [begin, end) of kWidth panels, below their diagonal blocks: a -= u q^T +
// q u^T for the pending reflector, then the products of a with next, by column and by row. `a` and
// by_row point to the row `begin`. From there on rows lie one after the other; in the matrix they
// are `run` of every `step`.
template <int kWidth, bool kPending, typename Pack>
SES_INLINE void update_and_multiply_panels(Pack* a, long stride, Pack* by_row, int panel, int begin,
                                           int end, int run, int step, const Pack* u, const Pack* q,
                                           const Pack* next, Pack* column_sum) {
  using Scalar = typename Pack::Scalar;
  const Scalar* u_row = reinterpret_cast<const Scalar*>(u);
  const Scalar* q_row = reinterpret_cast<const Scalar*>(q);
  const Scalar* next_row = reinterpret_cast<const Scalar*>(next);
  Pack u_column[kWidth], q_column[kWidth], next_column[kWidth], sum[kWidth];
  for (int c = 0; c < kWidth; ++c) {
    if (kPending) u_column[c] = u[panel + c];
    if (kPending) q_column[c] = q[panel + c];
    next_column[c] = next[panel + c];
    sum[c] = column_sum[panel + c];
  }
  for (int first = begin; first < end; first += step) {
    const int last = first + run < end ? first + run : end;
    for (int r = first; r < last; ++r, ++a, ++by_row) {
      const Pack next_r = Pack::broadcast(next_row[r]);
      const Pack u_r = kPending ? Pack::broadcast(u_row[r]) : next_r;
      const Pack q_r = kPending ? Pack::broadcast(q_row[r]) : next_r;
      Pack row_sum = *by_row;
      for (int c = 0; c < kWidth; ++c) {
        Pack x = a[c * stride];
        if (kPending) {
          x = fnma(u_r, q_column[c], x);
          x = fnma(q_r, u_column[c], x);
          a[c * stride] = x;
        }
        sum[c] = fma(next_r, x, sum[c]);
        row_sum = fma(next_column[c], x, row_sum);
      }
      *by_row = row_sum;
    }
  }
  for (int c = 0; c < kWidth; ++c) column_sum[panel + c] = sum[c];
}

// The same on a diagonal block, which is kept whole: its columns are its rows.
template <bool kPending, typename Pack>
SES_INLINE void update_and_multiply_diagonal(Pack* a, int panel, int end, const Pack* u,
                                             const Pack* q, const Pack* next, Pack* column_sum) {
  using Scalar = typename Pack::Scalar;
  const Scalar* u_row = reinterpret_cast<const Scalar*>(u);
  const Scalar* q_row = reinterpret_cast<const Scalar*>(q);
  const Scalar* next_row = reinterpret_cast<const Scalar*>(next);
  Pack sum = Pack::broadcast(0);
  for (int r = panel * kPanelColumns; r < end; ++r, ++a) {
    Pack x = *a;
    if (kPending) {
      x = fnma(Pack::broadcast(u_row[r]), q[panel], x);
      x = fnma(Pack::broadcast(q_row[r]), u[panel], x);
      *a = x;
    }
    sum = fma(Pack::broadcast(next_row[r]), x, sum);
  }
  column_sum[panel] = sum;
}

// What a part adds to A next on the leading block of size `size`, whose rows are updated first.
template <bool kPending, typename Pack>
static void update_and_multiply_part(const PanelWorkspace<Pack>& work, int part, int size,
                                     const Pack* u, const Pack* q, const Pack* next,
                                     Pack* column_sum) {
  const int panels = (size + kPanelColumns - 1) / kPanelColumns;
  const int run = work.parts == 1 ? size : kPartRows, step = work.parts * run;
  const long stride = work.part_rows;
  auto smaller = [&](int row) { return row < size ? row : size; };
  for_rows(part, work.parts, 0, panels * kPanelColumns, [&](int begin, int end) {
    Pack* sums = work.at_row(work.by_row, begin);
    for (int r = begin; r < end; ++r) *sums++ = Pack::broadcast(0);
  });
  for (int panel = 0, block = 0; panel < panels; panel += kPassPanels, ++block) {
    const int count = panels - panel < kPassPanels ? panels - panel : kPassPanels;
    // Blocks of rows from this one to the first of the part
    const int ahead = (part - block) & (work.parts - 1);
    int below = (block + ahead) * kPartRows;
    Pack* a = work.at(work.a, panel, below);
    Pack* by_row = work.at_row(work.by_row, below);
    if (ahead == 0) {
      const int end = smaller((panel + count) * kPanelColumns);
      for (int c = 0; c < count; ++c) {
        const int first = (c + 1) * kPanelColumns;  // row below the diagonal block
        Pack* diagonal = a + c * (stride + kPanelColumns);
        update_and_multiply_diagonal<kPending>(diagonal, panel + c, smaller(below + first), u, q,
                                               next, column_sum);
        update_and_multiply_panels<1, kPending>(diagonal + kPanelColumns, stride, by_row + first,
                                                panel + c, below + first, end, run, step, u, q,
                                                next, column_sum);
      }
      below += work.parts * kPartRows;
      a += kPartRows;
      by_row += kPartRows;
    } else {
      for (int c = panel; c < panel + count; ++c) column_sum[c] = Pack::broadcast(0);
    }
    if (count == kPassPanels)
      update_and_multiply_panels<kPassPanels, kPending>(a, stride, by_row, panel, below, size, run,
                                                        step, u, q, next, column_sum);
  }
  for_panels(part, work.parts, panels, [&](int c) {
    column_sum[c] =
        column_sum[c] + Square<Pack>::sums_of_lanes(work.at_row(work.by_row, c * kPanelColumns));
  });
}

// Leaves d and e of the tridiagonal, and in row i of a the reflector of step i, 0 from i on. d, e
// and inverse_h are the first thread's until the next barrier. False for a thread that is to
// return.
//
// A step has one barrier. Before it, each part updates its rows and multiplies them; after it,
// every thread adds up the products and makes the next reflector for itself, in vectors of its own.
template <typename Pack>
static bool tridiagonalise(const PanelWorkspace<Pack>& work, CpuGroup& group) {
  using Scalar = typename Pack::Scalar;
  const Scalar negligible =
      ScalarTraits<Scalar>::kMinNormal / (ScalarTraits<Scalar>::kEps * ScalarTraits<Scalar>::kEps);
  const int rank = group.thread_rank();
  Pack* vectors = work.vectors + 4L * rank * work.sums;
  const Pack* u = nullptr;
  const Pack* q = nullptr;
  auto scalar = [](const Pack* vector, int i) {
    return reinterpret_cast<const Scalar*>(vector)[i];
  };
  auto is_mine = [&](int row) { return (work.part_of(row) & (group.num_threads() - 1)) == rank; };
  // For those that do not have the row.
  auto publish = [&](int row, int turn) {
    if (group.num_threads() > 1 && is_mine(row))
      for (int c = 0; c <= row / kPanelColumns; ++c)
        work.last_row[turn][c] = *work.at(work.a, c, row);
  };
  if (rank == 0)
    for (long i = 0; i < work.rows; ++i) work.inverse_h[i] = 0;
  publish(work.n - 1, work.n % 2);
  if (!group.sync()) return false;
  for (int i = work.n - 1; i >= 1; --i) {
    const int last = i / kPanelColumns;  // the panel of the diagonal
    const int turn = i % 2, threads = group.num_threads();
    const bool has_row = is_mine(i);
    Pack* a = work.at(work.a, 0, i);
    Pack* v = vectors + turn * work.sums;
    Pack* product = work.product[turn] + rank * work.sums;
    Pack* p = threads == 1 ? product : vectors + (2 + turn) * work.sums;
    Pack sigmas = Pack::broadcast(0);
    for (int c = 0; c <= last; ++c) {
      Pack x = has_row ? a[c * work.part_rows] : work.last_row[1 - turn][c];
      if (q != nullptr) {
        x = fnma(Pack::broadcast(scalar(u, i)), q[c], x);
        x = fnma(Pack::broadcast(scalar(q, i)), u[c], x);
      }
      v[c] = x;
    }
    if (rank == 0) work.d[i] = scalar(v, i);
    const auto inside =
        Pack::iota() < Pack::broadcast(static_cast<Scalar>(i - last * kPanelColumns));
    v[last] = select(inside, v[last], Pack::broadcast(0));
    for (int c = 0; c <= last; ++c) sigmas = fma(v[c], v[c], sigmas);
    const Scalar f = scalar(v, i - 1);
    if (i == 1) {
      if (rank == 0) work.e[0] = f;
      break;
    }
    const Scalar sigma = sum_of_lanes(sigmas);
    const Scalar root = sqrt(sigma);
    const Scalar g = f < 0 ? root : -root;
    const bool skip = sigma < negligible;
    const Scalar inverse_h = skip ? Scalar(0) : Scalar(1) / (sigma - f * g);
    if (rank == 0) {
      work.e[i - 1] = skip ? Scalar(0) : g;
      work.inverse_h[i] = inverse_h;
    }
    reinterpret_cast<Scalar*>(v)[i - 1] = f - g;
    if (has_row)
      for (int c = 0; c <= last; ++c) a[c * work.part_rows] = v[c];

    for_own_parts(group, work.parts, [&](int part) {
      Pack* sums = work.parts == threads ? product : work.column_sum + part * work.sums;
      if (q == nullptr)
        update_and_multiply_part<false>(work, part, i, u, q, v, sums);
      else
        update_and_multiply_part<true>(work, part, i, u, q, v, sums);
    });
    if (work.parts > threads)
      add_up(work.parts / threads, work.column_sum + rank * work.sums, threads * work.sums,
             last + 1, product);
    publish(i - 1, turn);
    if (!group.sync()) return false;
    if (threads > 1) add_up(threads, work.product[turn], work.sums, last + 1, p);

    Pack dots = Pack::broadcast(0);
    p[last] = select(inside, p[last], Pack::broadcast(0));
    for (int c = 0; c <= last; ++c) dots = fma(v[c], p[c], dots);
    // In this order: inverse_h^2 overflows where the rest of the matrix is rounding of rounding.
    const Pack half = Pack::broadcast(Scalar(0.5) * inverse_h * (inverse_h * sum_of_lanes(dots)));
    for (int c = 0; c <= last; ++c) p[c] = fnma(half, v[c], Pack::broadcast(inverse_h) * p[c]);
    u = v;
    q = p;
  }
  if (rank > 0) return true;
  work.d[0] = scalar(work.a, 0);
  if (q != nullptr) work.d[0] -= 2 * scalar(u, 0) * scalar(q, 0);
  work.e[work.n - 1] = 0;
  return true;
}

}  // namespace SES_ISA
}  // namespace ses
