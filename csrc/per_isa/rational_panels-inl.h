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

template <typename P>
struct PanelWorkspace {
  using T = typename P::Scalar;
  static_assert(P::kLanes == kPanel, "");

  int n, panels, packs;  // packs of poles
  long rows;             // n rounded up to whole panels
  P* a;              // [panels, rows] P: its lower triangle with full diagonal blocks; reflectors
  P* f;              // [panels, rows] the sum over the poles, stored as P is
  P* by_row;         // [rows] partial sums of a row of A u
  P* u[2];           // [panels] reflectors, this one and the one before, in turn
  P* q[2];           // [panels] A u, then the other factor of the rank-2 update
  P* v_row;          // [rows] a block of eight reflectors V, by row
  P* y_row;          // [rows] Y = F V, by row
  P* y_column;       // [panels, 8] Y^T
  P* w_column;       // [panels, 8] -W^T, the other factor of the update
  P* pole_ratio;     // [rows, pole packs] G(k + 1, c) / G(k, c) of every pole's resolvent, c <= k
  P* pole_diagonal;  // [rows, pole packs] weighted diagonal of the resolvents
  T *d, *e, *inverse_h;  // [rows]
  P* end;

  // A workspace at null measures itself.
  PanelWorkspace(void* memory, int size, int poles) : n(size) {
    panels = (n + kPanel - 1) / kPanel;
    rows = static_cast<long>(panels) * kPanel;
    packs = (poles + kPanel - 1) / kPanel;
    P* next = static_cast<P*>(memory);
    auto take = [&next](long count) {
      P* start = next;
      next += count;
      return start;
    };
    a = take(panels * rows);
    f = take(panels * rows);
    by_row = take(rows);
    for (P*& vector : u) vector = take(panels);
    for (P*& vector : q) vector = take(panels);
    v_row = take(rows);
    y_row = take(rows);
    y_column = take(rows);
    w_column = take(rows);
    pole_ratio = take(rows * packs);
    pole_diagonal = take(rows * packs);
    d = reinterpret_cast<T*>(take(panels));
    e = reinterpret_cast<T*>(take(panels));
    inverse_h = reinterpret_cast<T*>(take(panels));
    end = next;
  }
  static long bytes(int n, int poles) {
    const PanelWorkspace at_null(nullptr, n, poles);
    return static_cast<long>(reinterpret_cast<char*>(at_null.end) - static_cast<char*>(nullptr));
  }
};

// Rows [begin, end) of kCount panels, below their diagonal blocks: a -= u q^T + q u^T for the
// pending reflector, then the products of a with next, by column and by row.
template <int kCount, bool kPending, typename P>
SES_INLINE void update_and_multiply_panels(const PanelWorkspace<P>& work, int panel, int begin,
                                           int end, const P* u, const P* q, const P* next,
                                           P* column_sum) {
  using T = typename P::Scalar;
  const T* u_row = reinterpret_cast<const T*>(u);
  const T* q_row = reinterpret_cast<const T*>(q);
  const T* next_row = reinterpret_cast<const T*>(next);
  P u_column[kCount], q_column[kCount], next_column[kCount], sum[kCount];
  for (int c = 0; c < kCount; ++c) {
    if (kPending) u_column[c] = u[panel + c];
    if (kPending) q_column[c] = q[panel + c];
    next_column[c] = next[panel + c];
    sum[c] = column_sum[panel + c];
  }
  P* a = work.a + panel * work.rows;
  for (int r = begin; r < end; ++r) {
    const P next_r = P::broadcast(next_row[r]);
    const P u_r = kPending ? P::broadcast(u_row[r]) : next_r;
    const P q_r = kPending ? P::broadcast(q_row[r]) : next_r;
    P row_sum = work.by_row[r];
    for (int c = 0; c < kCount; ++c) {
      P x = a[c * work.rows + r];
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
  for (int c = 0; c < kCount; ++c) column_sum[panel + c] = sum[c];
}

// The same on a diagonal block, which is kept whole: its columns are its rows.
template <bool kPending, typename P>
SES_INLINE void update_and_multiply_diagonal(const PanelWorkspace<P>& work, int panel, int end,
                                             const P* u, const P* q, const P* next, P* column_sum) {
  using T = typename P::Scalar;
  const T* u_row = reinterpret_cast<const T*>(u);
  const T* q_row = reinterpret_cast<const T*>(q);
  const T* next_row = reinterpret_cast<const T*>(next);
  P* a = work.a + panel * work.rows;
  P sum = P::broadcast(0);
  for (int r = panel * kPanel; r < end; ++r) {
    P x = a[r];
    if (kPending) {
      x = fnma(P::broadcast(u_row[r]), q[panel], x);
      x = fnma(P::broadcast(q_row[r]), u[panel], x);
      a[r] = x;
    }
    sum = fma(P::broadcast(next_row[r]), x, sum);
  }
  column_sum[panel] = sum;
}

// product = A next on the leading block of size `size`, whose rows are updated first.
template <bool kPending, typename P>
static void update_and_multiply_leading(const PanelWorkspace<P>& work, int size, const P* u,
                                        const P* q, const P* next, P* product) {
  constexpr int kCount = 3;
  const int panels = (size + kPanel - 1) / kPanel;
  for (int r = 0; r < panels * kPanel; ++r) work.by_row[r] = P::broadcast(0);
  auto smaller = [&](int row) { return row < size ? row : size; };
  int panel = 0;
  for (; panel < panels; panel += kCount) {
    const int count = panels - panel < kCount ? panels - panel : kCount;
    for (int c = panel; c < panel + count; ++c) {
      update_and_multiply_diagonal<kPending>(work, c, smaller((c + 1) * kPanel), u, q, next,
                                             product);
      update_and_multiply_panels<1, kPending>(work, c, smaller((c + 1) * kPanel),
                                              smaller((panel + count) * kPanel), u, q, next,
                                              product);
    }
    const int below = smaller((panel + count) * kPanel);
    if (count == kCount)
      update_and_multiply_panels<kCount, kPending>(work, panel, below, size, u, q, next, product);
  }
  for (int c = 0; c < panels; ++c)
    product[c] = product[c] + Square<P>::sums_of_lanes(work.by_row + c * kPanel);
}

// Leaves d and e of the tridiagonal, and in row i of a the reflector of step i, 0 from i on.
// Householder, as householder-inl.h does it for a pack of matrices.
template <typename P>
static void tridiagonalise(const PanelWorkspace<P>& work) {
  using T = typename P::Scalar;
  const T negligible =
      ScalarTraits<T>::kMinNormal / (ScalarTraits<T>::kEps * ScalarTraits<T>::kEps);
  const P* u = nullptr;
  const P* q = nullptr;
  for (long i = 0; i < work.rows; ++i) work.inverse_h[i] = 0;
  auto scalar = [](const P* vector, int i) { return reinterpret_cast<const T*>(vector)[i]; };
  for (int i = work.n - 1; i >= 1; --i) {
    const int last = i / kPanel;  // the panel of the diagonal
    P* v = work.u[i % 2];
    P* p = work.q[i % 2];
    P sigmas = P::broadcast(0);
    for (int c = 0; c <= last; ++c) {
      P x = work.a[c * work.rows + i];
      if (q != nullptr) {
        x = fnma(P::broadcast(scalar(u, i)), q[c], x);
        x = fnma(P::broadcast(scalar(q, i)), u[c], x);
      }
      v[c] = x;
    }
    work.d[i] = scalar(v, i);
    const auto inside = P::iota() < P::broadcast(static_cast<T>(i - last * kPanel));
    v[last] = select(inside, v[last], P::broadcast(0));
    for (int c = 0; c <= last; ++c) sigmas = fma(v[c], v[c], sigmas);
    const T f = scalar(v, i - 1);
    if (i == 1) {
      work.e[0] = f;
      break;
    }
    const T sigma = sum_of_lanes(sigmas);
    const T root = sqrt(sigma);
    const T g = f < 0 ? root : -root;
    const bool skip = sigma < negligible;
    const T inverse_h = skip ? T(0) : T(1) / (sigma - f * g);
    work.e[i - 1] = skip ? T(0) : g;
    work.inverse_h[i] = inverse_h;
    reinterpret_cast<T*>(v)[i - 1] = f - g;
    for (int c = 0; c <= last; ++c) work.a[c * work.rows + i] = v[c];

    if (q == nullptr)
      update_and_multiply_leading<false>(work, i, u, q, v, p);
    else
      update_and_multiply_leading<true>(work, i, u, q, v, p);
    P dots = P::broadcast(0);
    p[last] = select(inside, p[last], P::broadcast(0));
    for (int c = 0; c <= last; ++c) dots = fma(v[c], p[c], dots);
    // In this order: inverse_h^2 overflows where the rest of the matrix is rounding of rounding.
    const P half = P::broadcast(T(0.5) * inverse_h * (inverse_h * sum_of_lanes(dots)));
    for (int c = 0; c <= last; ++c) p[c] = fnma(half, v[c], P::broadcast(inverse_h) * p[c]);
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
template <typename P>
static typename P::Scalar resolvents(const PanelWorkspace<P>& work,
                                     const PaddedPoles<typename P::Scalar>& poles,
                                     typename P::Scalar c, typename P::Scalar s) {
  using T = typename P::Scalar;
  const P one = P::broadcast(1), zero = P::broadcast(0);
  const P* t = reinterpret_cast<const P*>(poles.t);
  const P* weight = reinterpret_cast<const P*>(poles.w);
  const int n = work.n, packs = work.packs;
  P previous[kMaxPoles / kPanel];  // 1 / D, then the diagonal
  T smallest = 1;
  for (int k = n - 1; k >= 0; --k) {
    const P e = P::broadcast(work.e[k]);
    P* ratio = work.pole_ratio + static_cast<long>(k + 1) * packs;
    P* inverse = work.pole_diagonal + static_cast<long>(k) * packs;
    for (int q = 0; q < packs; ++q) {
      P pivot = fma(P::broadcast(s), t[q], P::broadcast(work.d[k]));
      if (k + 1 < n) {
        ratio[q] = zero - e * previous[q];
        pivot = fma(ratio[q], e, pivot);
      }
      if (q == 0) {
        const T first = reinterpret_cast<const T*>(&pivot)[0];
        smallest = first < smallest ? first : smallest;
      }
      previous[q] = inverse[q] = one / pivot;
    }
  }
  if (!(smallest > 0)) return ScalarTraits<T>::kNaN;
  P sum = zero;
  T trace = 0;
  for (int k = 0; k < n; ++k) {
    P* ratio = work.pole_ratio + static_cast<long>(k) * packs;
    P* diagonal = work.pole_diagonal + static_cast<long>(k) * packs;
    for (int q = 0; q < packs; ++q) {
      const P w = P::broadcast(s) * weight[q];
      const P above = previous[q];
      P here = diagonal[q];
      if (k == 0) {
        ratio[q] = zero;
      } else {
        here = fma(ratio[q] * ratio[q], above, here);
        sum = fma(P::broadcast(2 * work.e[k - 1]), ratio[q] * (w * above), sum);
      }
      previous[q] = here;
      diagonal[q] = w * here;
      sum = fma(P::broadcast(work.d[k]), diagonal[q], sum);
    }
    trace += work.d[k];
  }
  for (long k = n * packs; k < work.rows * packs; ++k)
    work.pole_ratio[k] = work.pole_diagonal[k] = zero;
  return sum_of_lanes(sum) - c * trace;
}

// Column panel of F = sum_j w_j (T + t_j I)^{-1}, from the diagonal down, for one block of poles.
template <typename P>
static void sum_poles(const PanelWorkspace<P>& work, int panel, int first) {
  using T = typename P::Scalar;
  const P zero = P::broadcast(0);
  // Decayed entries go to zero before they become denormal numbers, which are slow.
  const P least = P::broadcast(ScalarTraits<T>::kMinNormal / ScalarTraits<T>::kEps);
  const long stride = static_cast<long>(work.packs) * kPanel;
  const T* ratio = reinterpret_cast<const T*>(work.pole_ratio) + first;
  const T* diagonal = reinterpret_cast<const T*>(work.pole_diagonal) + first;
  P g[kPoleBlock];
  for (int j = 0; j < kPoleBlock; ++j) g[j] = zero;
  P* out = work.f + panel * work.rows;
  const int begin = panel * kPanel;
  for (int r = begin; r < begin + kPanel; ++r) {
    const P unit =
        select(P::iota() == P::broadcast(static_cast<T>(r - begin)), P::broadcast(1), zero);
    P sum = first == 0 ? zero : out[r];
    for (int j = 0; j < kPoleBlock; ++j) {
      g[j] = fma(unit, P::broadcast(diagonal[r * stride + j]),
                 g[j] * P::broadcast(ratio[r * stride + j]));
      sum = sum + g[j];
    }
    out[r] = sum;
  }
  for (int r = begin + kPanel; r < work.rows; ++r) {
    P sum = first == 0 ? zero : out[r];
    for (int j = 0; j < kPoleBlock; ++j) {
      g[j] = g[j] * P::broadcast(ratio[r * stride + j]);
      sum = sum + g[j];
    }
    out[r] = sum;
    if (r % 32 == 0)
      for (int j = 0; j < kPoleBlock; ++j) g[j] = select(abs(g[j]) < least, zero, g[j]);
  }
}

template <typename P>
static void sum_all_poles(const PanelWorkspace<P>& work, int poles) {
  using T = typename P::Scalar;
  for (int panel = 0; panel < work.panels; ++panel) {
    for (int first = 0; first < poles; first += kPoleBlock) sum_poles(work, panel, first);
    P* block = work.f + panel * work.rows + panel * kPanel;
    P upper[kPanel];
    Square<P>::transpose(block, upper);
    for (int r = 0; r < kPanel; ++r)
      block[r] = select(P::iota() <= P::broadcast(T(r)), block[r], upper[r]);
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
template <typename P>
SES_INLINE void update_row(const PanelWorkspace<P>& work, int k, int b) {
  using T = typename P::Scalar;
  const P* v_column = work.a + k * kPanel;  // [panels, stride rows]
  for_widths(b < k ? b + 1 : k + 1, [&](int c, auto width) {
    constexpr int kWidth = decltype(width)::value;
    for (int j = 0; j < kPanel; j += kTileRows) {
      P* out = work.f + c * work.rows + b * kPanel + j;
      P sum[kTileRows][kWidth];
      load_tile(out, work.rows, sum);
      if (b <= k)
        multiply_tile(kPanel, reinterpret_cast<const T*>(v_column + b * work.rows) + j, kPanel, 1,
                      work.w_column + c * kPanel, kPanel, sum);
      multiply_tile(kPanel, reinterpret_cast<const T*>(work.w_column + b * kPanel) + j, kPanel, 1,
                    v_column + c * work.rows, work.rows, sum);
      store_tile(sum, out, work.rows);
    }
  });
}

// What a row of blocks of F adds to Y = F V of block k: each block stands for its mirror image too.
template <typename P>
SES_INLINE void multiply_row(const PanelWorkspace<P>& work, int k, int b) {
  using T = typename P::Scalar;
  if (b <= k) {
    for_widths(b + 1, [&](int c, auto width) {
      constexpr int kWidth = decltype(width)::value;
      for (int j = 0; j < kPanel; j += kTileRows) {
        P sum[kTileRows][kWidth];
        P* out = work.y_column + c * kPanel + j;
        load_tile(out, kPanel, sum);
        multiply_tile(kPanel, reinterpret_cast<const T*>(work.v_row + b * kPanel) + j, kPanel, 1,
                      work.f + c * work.rows + b * kPanel, work.rows, sum);
        store_tile(sum, out, kPanel);
      }
    });
  }
  const int panels = b <= k ? b : k + 1;
  for (int j = 0; j < kPanel; j += kTileRows) {
    P sum[kTileRows][1];
    clear(sum);
    for (int c = 0; c < panels; ++c)
      multiply_tile(kPanel, reinterpret_cast<const T*>(work.f + c * work.rows + b * kPanel + j), 1,
                    kPanel, work.v_row + c * kPanel, 0, sum);
    store_tile(sum, work.y_row + b * kPanel + j, 0);
  }
}

// product = V^T right, both by row
template <typename P>
SES_INLINE void multiply_transposed(const PanelWorkspace<P>& work, int k, const P* right,
                                    P* product) {
  for (int j = 0; j < kPanel; j += kTileRows) {
    P sum[kTileRows][1];
    clear(sum);
    multiply_tile((k + 1) * kPanel, reinterpret_cast<const typename P::Scalar*>(work.v_row) + j,
                  kPanel, 1, right, 0, sum);
    store_tile(sum, product + j, 0);
  }
}

// -W^T = X V^T / 2 - S Y^T
template <typename P>
static void second_factor(const PanelWorkspace<P>& work, int k) {
  using T = typename P::Scalar;
  const P zero = P::broadcast(0);
  for (int c = 0; c < work.panels; ++c) {  // Y^T and Y each hold what the other lacks
    P* column = work.y_column + c * kPanel;
    P* row = work.y_row + c * kPanel;
    P other[kPanel];
    Square<P>::transpose(row, other);
    for (int j = 0; j < kPanel; ++j) column[j] = column[j] + other[j];
    Square<P>::transpose(column, row);
  }
  P gram[kPanel], s[kPanel], z[kPanel], sz[kPanel], x[kPanel];
  multiply_transposed(work, k, work.v_row, gram);
  multiply_transposed(work, k, work.y_row, z);
  auto entry = [](const P& row, int i) {
    return P::broadcast(reinterpret_cast<const T*>(&row)[i]);
  };
  for (int j = 0; j < kPanel; ++j) {
    const P h = P::broadcast(work.inverse_h[k * kPanel + j]);
    P sum = zero;
    for (int l = 0; l < j; ++l) sum = fnma(entry(gram[j], l), s[l], sum);
    s[j] = h * select(P::iota() == P::broadcast(T(j)), P::broadcast(1), sum);
  }
  for (int j = 0; j < kPanel; ++j) {
    sz[j] = zero;
    for (int l = 0; l <= j; ++l) sz[j] = fma(entry(s[j], l), z[l], sz[j]);
  }
  Square<P>::transpose(sz, z);
  for (int j = 0; j < kPanel; ++j) {
    x[j] = zero;
    for (int l = 0; l <= j; ++l) x[j] = fma(entry(s[j], l), z[l], x[j]);
    x[j] = P::broadcast(T(0.5)) * x[j];
  }
  for (int c = 0; c < work.panels; ++c) {
    const P* v = work.a + c * work.rows + k * kPanel;
    const P* y = work.y_column + c * kPanel;
    for (int j = 0; j < kPanel; ++j) {
      P sum = zero;
      if (c <= k)
        for (int l = 0; l < kPanel; ++l) sum = fma(entry(x[j], l), v[l], sum);
      for (int l = 0; l <= j; ++l) sum = fnma(entry(s[j], l), y[l], sum);
      work.w_column[c * kPanel + j] = sum;
    }
  }
}

// F = Q F Q^T. Each pass over F applies one block and multiplies by the next.
template <typename P>
static void reflect(const PanelWorkspace<P>& work) {
  for (int k = -1; k < work.panels; ++k) {
    const int next = k + 1;
    if (next < work.panels) {
      for (int c = 0; c <= next; ++c)
        Square<P>::transpose(work.a + c * work.rows + next * kPanel, work.v_row + c * kPanel);
      for (long r = 0; r < work.rows; ++r) work.y_column[r] = P::broadcast(0);
    }
    for (int b = 0; b < work.panels; ++b) {
      if (k >= 0) update_row(work, k, b);
      if (next < work.panels) multiply_row(work, next, b);
    }
    if (next < work.panels) second_factor(work, next);
  }
}

// F = J F J, J = I - 11^T / n.
template <typename P>
static void double_center(const PanelWorkspace<P>& work) {
  using T = typename P::Scalar;
  const P zero = P::broadcast(0);
  for (long r = 0; r < work.rows; ++r) work.by_row[r] = zero;
  P* mean = work.u[0];  // of each row
  for (int c = 0; c < work.panels; ++c) {
    P below = zero;  // a block stands for its mirror image too
    for (long r = c * kPanel; r < work.rows; ++r) {
      const P x = work.f[c * work.rows + r];
      work.by_row[r] = work.by_row[r] + x;
      if (r >= (c + 1) * kPanel) below = below + x;
    }
    mean[c] = below;
  }
  P total = zero;
  const P n = P::broadcast(static_cast<T>(work.n));
  for (int c = 0; c < work.panels; ++c) {
    mean[c] = (mean[c] + Square<P>::sums_of_lanes(work.by_row + c * kPanel)) / n;
    total = total + mean[c];
  }
  const P half = P::broadcast(sum_of_lanes(total) / static_cast<T>(2 * work.n));
  for (int c = 0; c < work.panels; ++c) mean[c] = mean[c] - half;
  const T* row_mean = reinterpret_cast<const T*>(mean);
  for (int c = 0; c < work.panels; ++c)
    for (long r = c * kPanel; r < work.rows; ++r) {
      P* x = work.f + c * work.rows + r;
      *x = *x - mean[c] - P::broadcast(row_mean[r]);
    }
}

// The lower triangle of [n, n], in panels.
template <typename P>
static void to_panels(const typename P::Scalar* gram, int n, P* out) {
  using T = typename P::Scalar;
  const P zero = P::broadcast(0);
  const int rows = (n + kPanel - 1) / kPanel * kPanel;
  for (int column = 0; column < n; column += kPanel, out += rows) {
    for (int r = column; r < rows; ++r)
      out[r] = r < n ? load<P>(gram + static_cast<long>(r) * n + column, n - column) : zero;
    P upper[kPanel];
    Square<P>::transpose(out + column, upper);
    for (int r = 0; r < kPanel; ++r)
      out[column + r] = select(P::iota() <= P::broadcast(T(r)), out[column + r], upper[r]);
  }
}

template <typename P, typename M>
static void rational(const P* gram, M* h, M* m, int n, bool center,
                     const PaddedPoles<typename P::Scalar>& poles, void* memory) {
  using T = typename P::Scalar;
  const PanelWorkspace<P> work(memory, n, poles.count);
  const long size = static_cast<long>(n) * n;
  T trace = 0;
  for (int i = 0; i < n; ++i)
    trace += reinterpret_cast<const T*>(gram + i / kPanel * work.rows + i)[i % kPanel];
  auto fill = [&](T value) {
    *h = static_cast<M>(value);
    for (long i = 0; m != nullptr && i < size; ++i) m[i] = static_cast<M>(value);
  };
  if (!has_spectrum(trace)) return fill(without_spectrum(trace));
  const T scale = T(1) / trace;
  for (int c = 0; c < work.panels; ++c)
    for (long r = c * kPanel; r < work.rows; ++r)
      work.a[c * work.rows + r] = gram[c * work.rows + r] * P::broadcast(scale);
  tridiagonalise(work);
  T s = 1, c = poles.c, entropy = resolvents(work, poles, c, s);
  for (int i = 0; i < kPoleScalings && !(entropy == entropy); ++i) {
    s *= 4;
    c = poles.c + __builtin_log(s);
    entropy = resolvents(work, poles, c, s);
  }
  if (!(entropy == entropy)) return fill(entropy);
  *h = static_cast<M>(entropy);
  if (m == nullptr) return;
  sum_all_poles(work, poles.count);
  reflect(work);
  // M = -(L + H I) / tr K, L = c I - F
  for (int r = 0; r < n; ++r) {
    P* diagonal = work.f + r / kPanel * work.rows + r;
    reinterpret_cast<T*>(diagonal)[r % kPanel] -= c + entropy;
  }
  if (center) double_center(work);
  const P factor = P::broadcast(scale);
  for (int row = 0; row < work.panels; ++row) {
    for (int column = 0; column <= row; ++column) {
      P* block = work.f + column * work.rows + row * kPanel;
      for (int r = 0; r < kPanel; ++r) block[r] = block[r] * factor;
      store_symmetric(block, row * kPanel, column * kPanel, n, m);
    }
  }
}

}  // namespace SES_ISA
}  // namespace ses
