// log P by partial fractions for one matrix, whose columns fill the SIMD lanes.
//
// P = Q T Q^T by Householder reflections, the sum over the poles on the tridiagonal T, and the
// reflections again, a block of them at a time in compact WY form (Schreiber and Van Loan, SIAM J.
// Sci. Stat. Comput. 10, 1989). All matrices lie in panels of eight columns (tile-inl.h): pack
// [panel c][row r] holds (r, 8 c .. 8 c + 7).
#pragma once

#include "poles-inl.h"
#include "simd-inl.h"
#include "tile-inl.h"

namespace ses {
namespace SES_ISA {

template <typename Pack>
struct PanelWorkspace {
  using Scalar = typename Pack::Scalar;
  static_assert(Pack::kLanes == kPanelColumns, "");

  int n, panels, packs;  // packs of poles
  long rows;             // n rounded up to whole panels
  Pack* a;           // [panels, rows] P: its lower triangle with full diagonal blocks; reflectors
  Pack* f;           // [panels, rows] the sum over the poles, stored as P is
  Pack* by_row;      // [rows] partial sums of a row of A u
  Pack* u[2];        // [panels] reflectors, this one and the one before, in turn
  Pack* q[2];        // [panels] A u, then the other factor of the rank-2 update
  Pack* v_row;       // [rows] a block of eight reflectors V, by row
  Pack* y_row;       // [rows] Y = F V, by row
  Pack* y_column;    // [panels, 8] Y^T
  Pack* w_column;    // [panels, 8] -W^T, the other factor of the update
  Pack* pole_ratio;  // [rows, pole packs] G(k + 1, c) / G(k, c) of every pole's resolvent, c <= k
  Pack* pole_diagonal;        // [rows, pole packs] weighted diagonal of the resolvents
  Scalar *d, *e, *inverse_h;  // [rows]
  Pack* end;

  // A workspace at null measures itself.
  PanelWorkspace(void* memory, int size, int pole_count) : n(size) {
    panels = (n + kPanelColumns - 1) / kPanelColumns;
    rows = static_cast<long>(panels) * kPanelColumns;
    packs = (pole_count + kPanelColumns - 1) / kPanelColumns;
    Pack* next = static_cast<Pack*>(memory);
    auto take = [&next](long count) {
      Pack* start = next;
      next += count;
      return start;
    };
    a = take(panels * rows);
    f = take(panels * rows);
    by_row = take(rows);
    for (Pack*& vector : u) vector = take(panels);
    for (Pack*& vector : q) vector = take(panels);
    v_row = take(rows);
    y_row = take(rows);
    y_column = take(rows);
    w_column = take(rows);
    pole_ratio = take(rows * packs);
    pole_diagonal = take(rows * packs);
    d = reinterpret_cast<Scalar*>(take(panels));
    e = reinterpret_cast<Scalar*>(take(panels));
    inverse_h = reinterpret_cast<Scalar*>(take(panels));
    end = next;
  }
  static long bytes(int n, int pole_count) {
    const PanelWorkspace at_null(nullptr, n, pole_count);
    return static_cast<long>(reinterpret_cast<char*>(at_null.end) - static_cast<char*>(nullptr));
  }
};

// Rows [begin, end) of kWidth panels, below their diagonal blocks: a -= u q^T + q u^T for the
// pending reflector, then the products of a with next, by column and by row.
template <int kWidth, bool kPending, typename Pack>
SES_INLINE void update_and_multiply_panels(const PanelWorkspace<Pack>& work, int panel, int begin,
                                           int end, const Pack* u, const Pack* q, const Pack* next,
                                           Pack* column_sum) {
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
  Pack* a = work.a + panel * work.rows;
  for (int r = begin; r < end; ++r) {
    const Pack next_r = Pack::broadcast(next_row[r]);
    const Pack u_r = kPending ? Pack::broadcast(u_row[r]) : next_r;
    const Pack q_r = kPending ? Pack::broadcast(q_row[r]) : next_r;
    Pack row_sum = work.by_row[r];
    for (int c = 0; c < kWidth; ++c) {
      Pack x = a[c * work.rows + r];
      if (kPending) {
        x = fnma(u_r, q_column[c], x);
        x = fnma(q_r, u_column[c], x);
        a[c * work.rows + r] = x;
      }
      sum[c] = fma(next_r, x, sum[c]);
      row_sum = fma(next_column[c], x, row_sum);
    }
    work.by_row[r] = row_sum;
  }
  for (int c = 0; c < kWidth; ++c) column_sum[panel + c] = sum[c];
}

// The same on a diagonal block, which is kept whole: its columns are its rows.
template <bool kPending, typename Pack>
SES_INLINE void update_and_multiply_diagonal(const PanelWorkspace<Pack>& work, int panel, int end,
                                             const Pack* u, const Pack* q, const Pack* next,
                                             Pack* column_sum) {
  using Scalar = typename Pack::Scalar;
  const Scalar* u_row = reinterpret_cast<const Scalar*>(u);
  const Scalar* q_row = reinterpret_cast<const Scalar*>(q);
  const Scalar* next_row = reinterpret_cast<const Scalar*>(next);
  Pack* a = work.a + panel * work.rows;
  Pack sum = Pack::broadcast(0);
  for (int r = panel * kPanelColumns; r < end; ++r) {
    Pack x = a[r];
    if (kPending) {
      x = fnma(Pack::broadcast(u_row[r]), q[panel], x);
      x = fnma(Pack::broadcast(q_row[r]), u[panel], x);
      a[r] = x;
    }
    sum = fma(Pack::broadcast(next_row[r]), x, sum);
  }
  column_sum[panel] = sum;
}

// product = A next on the leading block of size `size`, whose rows are updated first.
template <bool kPending, typename Pack>
static void update_and_multiply_leading(const PanelWorkspace<Pack>& work, int size, const Pack* u,
                                        const Pack* q, const Pack* next, Pack* product) {
  constexpr int kWidth = 3;
  const int panels = (size + kPanelColumns - 1) / kPanelColumns;
  for (int r = 0; r < panels * kPanelColumns; ++r) work.by_row[r] = Pack::broadcast(0);
  auto smaller = [&](int row) { return row < size ? row : size; };
  int panel = 0;
  for (; panel < panels; panel += kWidth) {
    const int count = panels - panel < kWidth ? panels - panel : kWidth;
    for (int c = panel; c < panel + count; ++c) {
      update_and_multiply_diagonal<kPending>(work, c, smaller((c + 1) * kPanelColumns), u, q, next,
                                             product);
      update_and_multiply_panels<1, kPending>(work, c, smaller((c + 1) * kPanelColumns),
                                              smaller((panel + count) * kPanelColumns), u, q, next,
                                              product);
    }
    const int below = smaller((panel + count) * kPanelColumns);
    if (count == kWidth)
      update_and_multiply_panels<kWidth, kPending>(work, panel, below, size, u, q, next, product);
  }
  for (int c = 0; c < panels; ++c)
    product[c] = product[c] + Square<Pack>::sums_of_lanes(work.by_row + c * kPanelColumns);
}

// Leaves d and e of the tridiagonal, and in row i of a the reflector of step i, 0 from i on.
// Householder, as householder-inl.h does it for a pack of matrices.
template <typename Pack>
static void tridiagonalise(const PanelWorkspace<Pack>& work) {
  using Scalar = typename Pack::Scalar;
  const Scalar negligible =
      ScalarTraits<Scalar>::kMinNormal / (ScalarTraits<Scalar>::kEps * ScalarTraits<Scalar>::kEps);
  const Pack* u = nullptr;
  const Pack* q = nullptr;
  for (long i = 0; i < work.rows; ++i) work.inverse_h[i] = 0;
  auto scalar = [](const Pack* vector, int i) {
    return reinterpret_cast<const Scalar*>(vector)[i];
  };
  for (int i = work.n - 1; i >= 1; --i) {
    const int last = i / kPanelColumns;  // the panel of the diagonal
    Pack* v = work.u[i % 2];
    Pack* p = work.q[i % 2];
    Pack sigmas = Pack::broadcast(0);
    for (int c = 0; c <= last; ++c) {
      Pack x = work.a[c * work.rows + i];
      if (q != nullptr) {
        x = fnma(Pack::broadcast(scalar(u, i)), q[c], x);
        x = fnma(Pack::broadcast(scalar(q, i)), u[c], x);
      }
      v[c] = x;
    }
    work.d[i] = scalar(v, i);
    const auto inside =
        Pack::iota() < Pack::broadcast(static_cast<Scalar>(i - last * kPanelColumns));
    v[last] = select(inside, v[last], Pack::broadcast(0));
    for (int c = 0; c <= last; ++c) sigmas = fma(v[c], v[c], sigmas);
    const Scalar f = scalar(v, i - 1);
    if (i == 1) {
      work.e[0] = f;
      break;
    }
    const Scalar sigma = sum_of_lanes(sigmas);
    const Scalar root = sqrt(sigma);
    const Scalar g = f < 0 ? root : -root;
    const bool skip = sigma < negligible;
    const Scalar inverse_h = skip ? Scalar(0) : Scalar(1) / (sigma - f * g);
    work.e[i - 1] = skip ? Scalar(0) : g;
    work.inverse_h[i] = inverse_h;
    reinterpret_cast<Scalar*>(v)[i - 1] = f - g;
    for (int c = 0; c <= last; ++c) work.a[c * work.rows + i] = v[c];

    if (q == nullptr)
      update_and_multiply_leading<false>(work, i, u, q, v, p);
    else
      update_and_multiply_leading<true>(work, i, u, q, v, p);
    Pack dots = Pack::broadcast(0);
    p[last] = select(inside, p[last], Pack::broadcast(0));
    for (int c = 0; c <= last; ++c) dots = fma(v[c], p[c], dots);
    // In this order: inverse_h^2 overflows where the rest of the matrix is rounding of rounding.
    const Pack half = Pack::broadcast(Scalar(0.5) * inverse_h * (inverse_h * sum_of_lanes(dots)));
    for (int c = 0; c <= last; ++c) p[c] = fnma(half, v[c], Pack::broadcast(inverse_h) * p[c]);
    u = v;
    q = p;
  }
  work.d[0] = scalar(work.a, 0);
  if (q != nullptr) work.d[0] -= 2 * scalar(u, 0) * scalar(q, 0);
  work.e[work.n - 1] = 0;
}

// The resolvents (T + s t_j I)^{-1}, one pole a lane, in the form that gives each of their entries
// by one multiplication from the entry above. Returns the entropy, or NaN where rounding left T + s
// t_1 I indefinite. T is factored from the last row up, U D U^T: every term is then positive.
template <typename Pack>
static typename Pack::Scalar resolvents(const PanelWorkspace<Pack>& work,
                                        const PaddedPoles<typename Pack::Scalar>& poles,
                                        typename Pack::Scalar constant, typename Pack::Scalar s) {
  using Scalar = typename Pack::Scalar;
  const Pack one = Pack::broadcast(1), zero = Pack::broadcast(0);
  const Pack* t = reinterpret_cast<const Pack*>(poles.t);
  const Pack* weight = reinterpret_cast<const Pack*>(poles.w);
  const int n = work.n, packs = work.packs;
  Pack previous[kMaxPoles / Pack::kLanes];  // 1 / D, then the diagonal
  Scalar smallest = 1;
  for (int k = n - 1; k >= 0; --k) {
    const Pack e = Pack::broadcast(work.e[k]);
    Pack* ratio = work.pole_ratio + static_cast<long>(k + 1) * packs;
    Pack* inverse = work.pole_diagonal + static_cast<long>(k) * packs;
    for (int q = 0; q < packs; ++q) {
      Pack pivot = fma(Pack::broadcast(s), t[q], Pack::broadcast(work.d[k]));
      if (k + 1 < n) {
        ratio[q] = zero - e * previous[q];
        pivot = fma(ratio[q], e, pivot);
      }
      if (q == 0) {
        const Scalar first = reinterpret_cast<const Scalar*>(&pivot)[0];
        smallest = first < smallest ? first : smallest;
      }
      previous[q] = inverse[q] = one / pivot;
    }
  }
  if (!(smallest > 0)) return ScalarTraits<Scalar>::kNaN;
  Pack sum = zero;
  Scalar trace = 0;
  for (int k = 0; k < n; ++k) {
    Pack* ratio = work.pole_ratio + static_cast<long>(k) * packs;
    Pack* diagonal = work.pole_diagonal + static_cast<long>(k) * packs;
    for (int q = 0; q < packs; ++q) {
      const Pack w = Pack::broadcast(s) * weight[q];
      const Pack above = previous[q];
      Pack here = diagonal[q];
      if (k == 0) {
        ratio[q] = zero;
      } else {
        here = fma(ratio[q] * ratio[q], above, here);
        sum = fma(Pack::broadcast(2 * work.e[k - 1]), ratio[q] * (w * above), sum);
      }
      previous[q] = here;
      diagonal[q] = w * here;
      sum = fma(Pack::broadcast(work.d[k]), diagonal[q], sum);
    }
    trace += work.d[k];
  }
  for (long k = n * packs; k < work.rows * packs; ++k)
    work.pole_ratio[k] = work.pole_diagonal[k] = zero;
  return sum_of_lanes(sum) - constant * trace;
}

// Column panel of F = sum_j w_j (T + t_j I)^{-1}, from the diagonal down, for one block of poles.
template <typename Pack>
static void sum_poles(const PanelWorkspace<Pack>& work, int panel, int first) {
  using Scalar = typename Pack::Scalar;
  const Pack zero = Pack::broadcast(0);
  // Decayed entries go to zero before they become denormal numbers, which are slow.
  const Pack least = Pack::broadcast(ScalarTraits<Scalar>::kMinNormal / ScalarTraits<Scalar>::kEps);
  const long stride = static_cast<long>(work.packs) * kPanelColumns;
  const Scalar* ratio = reinterpret_cast<const Scalar*>(work.pole_ratio) + first;
  const Scalar* diagonal = reinterpret_cast<const Scalar*>(work.pole_diagonal) + first;
  Pack g[kPoleBlock];
  for (int j = 0; j < kPoleBlock; ++j) g[j] = zero;
  Pack* out = work.f + panel * work.rows;
  const int begin = panel * kPanelColumns;
  for (int r = begin; r < begin + kPanelColumns; ++r) {
    const Pack unit = select(Pack::iota() == Pack::broadcast(static_cast<Scalar>(r - begin)),
                             Pack::broadcast(1), zero);
    Pack sum = first == 0 ? zero : out[r];
    for (int j = 0; j < kPoleBlock; ++j) {
      g[j] = fma(unit, Pack::broadcast(diagonal[r * stride + j]),
                 g[j] * Pack::broadcast(ratio[r * stride + j]));
      sum = sum + g[j];
    }
    out[r] = sum;
  }
  for (int r = begin + kPanelColumns; r < work.rows; ++r) {
    Pack sum = first == 0 ? zero : out[r];
    for (int j = 0; j < kPoleBlock; ++j) {
      g[j] = g[j] * Pack::broadcast(ratio[r * stride + j]);
      sum = sum + g[j];
    }
    out[r] = sum;
    if (r % 32 == 0)
      for (int j = 0; j < kPoleBlock; ++j) g[j] = select(abs(g[j]) < least, zero, g[j]);
  }
}

template <typename Pack>
static void sum_all_poles(const PanelWorkspace<Pack>& work, int pole_count) {
  using Scalar = typename Pack::Scalar;
  for (int panel = 0; panel < work.panels; ++panel) {
    for (int first = 0; first < pole_count; first += kPoleBlock) sum_poles(work, panel, first);
    Pack* block = work.f + panel * work.rows + panel * kPanelColumns;
    Pack upper[kPanelColumns];
    Square<Pack>::transpose(block, upper);
    for (int r = 0; r < kPanelColumns; ++r)
      block[r] = select(Pack::iota() <= Pack::broadcast(Scalar(r)), block[r], upper[r]);
  }
}

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
//   V [n, 8]     v_row[r]            copied from V^T
//   V^T [8, n]   a[c][8 k + j]       where the tridiagonalisation left it
//   Y [n, 8]     y_row[r]            what the blocks of F left of the diagonal give as they stand;
//   Y^T [8, n]   y_column[c][j]      what they give mirrored, and those on it; then each the whole
//   -W^T [8, n]  w_column[c][j]
//   V^T V, V^T Y, S, X [8, 8]        gram, z, s and (halved) x of second_factor

// A row of blocks of F: F -= V W^T + W V^T for block k.
template <typename Pack>
SES_INLINE void update_row(const PanelWorkspace<Pack>& work, int k, int b) {
  using Scalar = typename Pack::Scalar;
  const Pack* v_column = work.a + k * kPanelColumns;  // [panels, stride rows]
  for_widths(b < k ? b + 1 : k + 1, [&](int c, auto width) {
    constexpr int kWidth = decltype(width)::value;
    for (int j = 0; j < kPanelColumns; j += kTileRows) {
      Pack* out = work.f + c * work.rows + b * kPanelColumns + j;
      Pack sum[kTileRows][kWidth];
      load_tile(out, work.rows, sum);
      if (b <= k)
        multiply_tile(kPanelColumns, reinterpret_cast<const Scalar*>(v_column + b * work.rows) + j,
                      kPanelColumns, 1, work.w_column + c * kPanelColumns, kPanelColumns, sum);
      multiply_tile(kPanelColumns,
                    reinterpret_cast<const Scalar*>(work.w_column + b * kPanelColumns) + j,
                    kPanelColumns, 1, v_column + c * work.rows, work.rows, sum);
      store_tile(sum, out, work.rows);
    }
  });
}

// What a row of blocks of F adds to Y = F V of block k: each block stands for its mirror image too.
template <typename Pack>
SES_INLINE void multiply_row(const PanelWorkspace<Pack>& work, int k, int b) {
  using Scalar = typename Pack::Scalar;
  if (b <= k) {
    for_widths(b + 1, [&](int c, auto width) {
      constexpr int kWidth = decltype(width)::value;
      for (int j = 0; j < kPanelColumns; j += kTileRows) {
        Pack sum[kTileRows][kWidth];
        Pack* out = work.y_column + c * kPanelColumns + j;
        load_tile(out, kPanelColumns, sum);
        multiply_tile(kPanelColumns,
                      reinterpret_cast<const Scalar*>(work.v_row + b * kPanelColumns) + j,
                      kPanelColumns, 1, work.f + c * work.rows + b * kPanelColumns, work.rows, sum);
        store_tile(sum, out, kPanelColumns);
      }
    });
  }
  const int panels = b <= k ? b : k + 1;
  for (int j = 0; j < kPanelColumns; j += kTileRows) {
    Pack sum[kTileRows][1];
    clear(sum);
    for (int c = 0; c < panels; ++c)
      multiply_tile(kPanelColumns,
                    reinterpret_cast<const Scalar*>(work.f + c * work.rows + b * kPanelColumns + j),
                    1, kPanelColumns, work.v_row + c * kPanelColumns, 0, sum);
    store_tile(sum, work.y_row + b * kPanelColumns + j, 0);
  }
}

// product = V^T right, both by row
template <typename Pack>
SES_INLINE void multiply_transposed(const PanelWorkspace<Pack>& work, int k, const Pack* right,
                                    Pack* product) {
  for (int j = 0; j < kPanelColumns; j += kTileRows) {
    Pack sum[kTileRows][1];
    clear(sum);
    multiply_tile((k + 1) * kPanelColumns,
                  reinterpret_cast<const typename Pack::Scalar*>(work.v_row) + j, kPanelColumns, 1,
                  right, 0, sum);
    store_tile(sum, product + j, 0);
  }
}

// -W^T = X V^T / 2 - S Y^T
template <typename Pack>
static void second_factor(const PanelWorkspace<Pack>& work, int k) {
  using Scalar = typename Pack::Scalar;
  const Pack zero = Pack::broadcast(0);
  for (int c = 0; c < work.panels; ++c) {  // Y^T and Y each hold what the other lacks
    Pack* column = work.y_column + c * kPanelColumns;
    Pack* row = work.y_row + c * kPanelColumns;
    Pack other[kPanelColumns];
    Square<Pack>::transpose(row, other);
    for (int j = 0; j < kPanelColumns; ++j) column[j] = column[j] + other[j];
    Square<Pack>::transpose(column, row);
  }
  Pack gram[kPanelColumns], s[kPanelColumns], z[kPanelColumns], sz[kPanelColumns], x[kPanelColumns];
  multiply_transposed(work, k, work.v_row, gram);
  multiply_transposed(work, k, work.y_row, z);
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
  for (int c = 0; c < work.panels; ++c) {
    const Pack* v = work.a + c * work.rows + k * kPanelColumns;
    const Pack* y = work.y_column + c * kPanelColumns;
    for (int j = 0; j < kPanelColumns; ++j) {
      Pack sum = zero;
      if (c <= k)
        for (int l = 0; l < kPanelColumns; ++l) sum = fma(entry(x[j], l), v[l], sum);
      for (int l = 0; l <= j; ++l) sum = fnma(entry(s[j], l), y[l], sum);
      work.w_column[c * kPanelColumns + j] = sum;
    }
  }
}

// F = Q F Q^T. Each pass over F applies one block and multiplies by the next.
template <typename Pack>
static void reflect(const PanelWorkspace<Pack>& work) {
  for (int k = -1; k < work.panels; ++k) {
    const int next = k + 1;
    if (next < work.panels) {
      for (int c = 0; c <= next; ++c)
        Square<Pack>::transpose(work.a + c * work.rows + next * kPanelColumns,
                                work.v_row + c * kPanelColumns);
      for (long r = 0; r < work.rows; ++r) work.y_column[r] = Pack::broadcast(0);
    }
    for (int b = 0; b < work.panels; ++b) {
      if (k >= 0) update_row(work, k, b);
      if (next < work.panels) multiply_row(work, next, b);
    }
    if (next < work.panels) second_factor(work, next);
  }
}

// F = J F J, J = I - 11^T / n.
template <typename Pack>
static void double_center(const PanelWorkspace<Pack>& work) {
  using Scalar = typename Pack::Scalar;
  const Pack zero = Pack::broadcast(0);
  for (long r = 0; r < work.rows; ++r) work.by_row[r] = zero;
  Pack* mean = work.u[0];  // of each row
  for (int c = 0; c < work.panels; ++c) {
    Pack below = zero;  // a block stands for its mirror image too
    for (long r = c * kPanelColumns; r < work.rows; ++r) {
      const Pack x = work.f[c * work.rows + r];
      work.by_row[r] = work.by_row[r] + x;
      if (r >= (c + 1) * kPanelColumns) below = below + x;
    }
    mean[c] = below;
  }
  Pack total = zero;
  const Pack n = Pack::broadcast(static_cast<Scalar>(work.n));
  for (int c = 0; c < work.panels; ++c) {
    mean[c] = (mean[c] + Square<Pack>::sums_of_lanes(work.by_row + c * kPanelColumns)) / n;
    total = total + mean[c];
  }
  const Pack half = Pack::broadcast(sum_of_lanes(total) / static_cast<Scalar>(2 * work.n));
  for (int c = 0; c < work.panels; ++c) mean[c] = mean[c] - half;
  const Scalar* row_mean = reinterpret_cast<const Scalar*>(mean);
  for (int c = 0; c < work.panels; ++c)
    for (long r = c * kPanelColumns; r < work.rows; ++r) {
      Pack* x = work.f + c * work.rows + r;
      *x = *x - mean[c] - Pack::broadcast(row_mean[r]);
    }
}

// The lower triangle of [n, n], in panels.
template <typename Pack>
static void to_panels(const typename Pack::Scalar* gram, int n, Pack* out) {
  using Scalar = typename Pack::Scalar;
  const Pack zero = Pack::broadcast(0);
  const int rows = (n + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  for (int column = 0; column < n; column += kPanelColumns, out += rows) {
    for (int r = column; r < rows; ++r)
      out[r] = r < n ? load<Pack>(gram + static_cast<long>(r) * n + column, n - column) : zero;
    Pack upper[kPanelColumns];
    Square<Pack>::transpose(out + column, upper);
    for (int r = 0; r < kPanelColumns; ++r)
      out[column + r] =
          select(Pack::iota() <= Pack::broadcast(Scalar(r)), out[column + r], upper[r]);
  }
}

template <typename Pack, typename Result>
static void rational(const Pack* gram, Result* h, Result* m, int n, bool center,
                     const PaddedPoles<typename Pack::Scalar>& poles, void* memory) {
  using Scalar = typename Pack::Scalar;
  const PanelWorkspace<Pack> work(memory, n, poles.count);
  const long size = static_cast<long>(n) * n;
  Scalar trace = 0;
  for (int i = 0; i < n; ++i)
    trace += reinterpret_cast<const Scalar*>(gram + i / kPanelColumns * work.rows +
                                             i)[i % kPanelColumns];
  auto fill = [&](Scalar value) {
    *h = static_cast<Result>(value);
    for (long i = 0; m != nullptr && i < size; ++i) m[i] = static_cast<Result>(value);
  };
  if (!has_spectrum(trace)) return fill(without_spectrum(trace));
  const Scalar scale = Scalar(1) / trace;
  for (int c = 0; c < work.panels; ++c)
    for (long r = c * kPanelColumns; r < work.rows; ++r)
      work.a[c * work.rows + r] = gram[c * work.rows + r] * Pack::broadcast(scale);
  tridiagonalise(work);
  Scalar s = 1, constant = poles.constant, entropy = resolvents(work, poles, constant, s);
  for (int i = 0; i < kPoleScalings && !(entropy == entropy); ++i) {
    s *= 4;
    constant = poles.constant + __builtin_log(s);
    entropy = resolvents(work, poles, constant, s);
  }
  if (!(entropy == entropy)) return fill(entropy);
  *h = static_cast<Result>(entropy);
  if (m == nullptr) return;
  sum_all_poles(work, poles.count);
  reflect(work);
  // M = -(L + H I) / tr K, L = constant I - F
  for (int r = 0; r < n; ++r) {
    Pack* diagonal = work.f + r / kPanelColumns * work.rows + r;
    reinterpret_cast<Scalar*>(diagonal)[r % kPanelColumns] -= constant + entropy;
  }
  if (center) double_center(work);
  const Pack factor = Pack::broadcast(scale);
  for (int row = 0; row < work.panels; ++row) {
    for (int column = 0; column <= row; ++column) {
      Pack* block = work.f + column * work.rows + row * kPanelColumns;
      for (int r = 0; r < kPanelColumns; ++r) block[r] = block[r] * factor;
      store_symmetric(block, row * kPanelColumns, column * kPanelColumns, n, m);
    }
  }
}

}  // namespace SES_ISA
}  // namespace ses
