// log P by partial fractions for one matrix, whose columns fill the SIMD lanes, by a group of
// threads.
//
// P = Q T Q^T by Householder reflections, the sum over the poles on the tridiagonal T, and the
// reflections again. All matrices lie in panels of eight columns (tile-inl.h): pack [panel c][row
// r] holds (r, 8 c .. 8 c + 7).
#pragma once

#include "group.h"
#include "panels-inl.h"
#include "poles-inl.h"
#include "reflect_panels-inl.h"
#include "simd-inl.h"
#include "tile-inl.h"
#include "tridiagonal_panels-inl.h"

namespace ses {
namespace SES_ISA {

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
  const int begin = panel * kPanelColumns, rows = static_cast<int>(work.rows);
  Pack* out = work.at(work.f, panel, begin);
  for (int r = begin; r < begin + kPanelColumns; ++r, ++out) {
    const Pack unit = select(Pack::iota() == Pack::broadcast(static_cast<Scalar>(r - begin)),
                             Pack::broadcast(1), zero);
    Pack sum = first == 0 ? zero : *out;
    for (int j = 0; j < kPoleBlock; ++j) {
      g[j] = fma(unit, Pack::broadcast(diagonal[r * stride + j]),
                 g[j] * Pack::broadcast(ratio[r * stride + j]));
      sum = sum + g[j];
    }
    *out = sum;
  }
  for (int r = begin + kPanelColumns; r < rows;) {
    const int end = (r / kPartRows + 1) * kPartRows < rows ? (r / kPartRows + 1) * kPartRows : rows;
    for (out = work.at(work.f, panel, r); r < end; ++r, ++out) {
      Pack sum = first == 0 ? zero : *out;
      for (int j = 0; j < kPoleBlock; ++j) {
        g[j] = g[j] * Pack::broadcast(ratio[r * stride + j]);
        sum = sum + g[j];
      }
      *out = sum;
      if (r % 32 == 0)
        for (int j = 0; j < kPoleBlock; ++j) g[j] = select(abs(g[j]) < least, zero, g[j]);
    }
  }
}

// The panels of this thread.
template <typename Pack>
static void sum_all_poles(const PanelWorkspace<Pack>& work, int pole_count, const CpuGroup& group) {
  using Scalar = typename Pack::Scalar;
  for (int panel = group.thread_rank(); panel < work.panels; panel += group.num_threads()) {
    for (int first = 0; first < pole_count; first += kPoleBlock) sum_poles(work, panel, first);
    Pack* block = work.at(work.f, panel, panel * kPanelColumns);
    Pack upper[kPanelColumns];
    Square<Pack>::transpose(block, upper);
    for (int r = 0; r < kPanelColumns; ++r)
      block[r] = select(Pack::iota() <= Pack::broadcast(Scalar(r)), block[r], upper[r]);
  }
}

// F = J F J, J = I - 11^T / n. False for a thread that is to return.
template <typename Pack>
static bool double_center(const PanelWorkspace<Pack>& work, CpuGroup& group) {
  using Scalar = typename Pack::Scalar;
  const Pack zero = Pack::broadcast(0);
  const int rows = static_cast<int>(work.rows);
  const int threads = group.num_threads(), rank = group.thread_rank();
  for_own_parts(group, work.parts, [&](int part) {
    for_rows(part, work.parts, 0, rows, [&](int begin, int end) {
      Pack* sums = work.at_row(work.by_row, begin);
      for (int r = begin; r < end; ++r) *sums++ = zero;
    });
    for (int c = 0; c < work.panels; ++c) {
      Pack below = zero;  // a block stands for its mirror image too
      for_rows(part, work.parts, c * kPanelColumns, rows, [&](int begin, int end) {
        const Pack* x = work.at(work.f, c, begin);
        Pack* sums = work.at_row(work.by_row, begin);
        for (int r = begin; r < end; ++r, ++x, ++sums) {
          *sums = *sums + *x;
          if (r >= (c + 1) * kPanelColumns) below = below + *x;
        }
      });
      work.column_sum[part * work.sums + c] = below;
    }
    for_panels(part, work.parts, work.panels, [&](int c) {
      Pack* sum = work.column_sum + part * work.sums + c;
      *sum = *sum + Square<Pack>::sums_of_lanes(work.at_row(work.by_row, c * kPanelColumns));
    });
  });
  add_up(work.parts / threads, work.column_sum + rank * work.sums, threads * work.sums, work.panels,
         work.product[0] + rank * work.sums);
  if (!group.sync()) return false;
  Pack* mean = work.vectors + 4L * rank * work.sums;  // of each row
  Pack total = zero;
  const Pack n = Pack::broadcast(static_cast<Scalar>(work.n));
  add_up(threads, work.product[0], work.sums, work.panels, mean);
  for (int c = 0; c < work.panels; ++c) {
    mean[c] = mean[c] / n;
    total = total + mean[c];
  }
  const Pack half = Pack::broadcast(sum_of_lanes(total) / static_cast<Scalar>(2 * work.n));
  for (int c = 0; c < work.panels; ++c) mean[c] = mean[c] - half;
  const Scalar* row_mean = reinterpret_cast<const Scalar*>(mean);
  for_own_parts(group, work.parts, [&](int part) {
    for (int c = 0; c < work.panels; ++c)
      for_rows(part, work.parts, c * kPanelColumns, rows, [&](int begin, int end) {
        Pack* x = work.at(work.f, c, begin);
        for (int r = begin; r < end; ++r, ++x) {
          *x = *x - mean[c] - Pack::broadcast(row_mean[r]);
        }
      });
  });
  return true;
}

// The lower triangle of [n, n], in panels: those of this thread.
template <typename Pack>
static void to_panels(const typename Pack::Scalar* gram, int n, Pack* panels,
                      const CpuGroup& group) {
  using Scalar = typename Pack::Scalar;
  const Pack zero = Pack::broadcast(0);
  const int rows = (n + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  for (int c = group.thread_rank(); c * kPanelColumns < n; c += group.num_threads()) {
    const int column = c * kPanelColumns;
    Pack* out = panels + static_cast<long>(c) * rows;
    for (int r = column; r < rows; ++r)
      out[r] = r < n ? load<Pack>(gram + static_cast<long>(r) * n + column, n - column) : zero;
    Pack upper[kPanelColumns];
    Square<Pack>::transpose(out + column, upper);
    for (int r = 0; r < kPanelColumns; ++r)
      out[column + r] =
          select(Pack::iota() <= Pack::broadcast(Scalar(r)), out[column + r], upper[r]);
  }
}

// Each thread of the group calls it, and may use the outputs after its next barrier.
template <typename Pack, typename Result>
static void rational(const Pack* gram, Result* h, Result* m, int n, bool center,
                     const PaddedPoles<typename Pack::Scalar>& poles, void* memory,
                     CpuGroup& group) {
  using Scalar = typename Pack::Scalar;
  const PanelWorkspace<Pack> work(memory, n, poles.count, group.num_threads());
  const bool is_first = group.thread_rank() == 0;
  const int rows = static_cast<int>(work.rows);
  const long size = static_cast<long>(n) * n;
  Scalar trace = 0;
  for (int i = 0; i < n; ++i)
    trace += reinterpret_cast<const Scalar*>(gram + i / kPanelColumns * work.rows +
                                             i)[i % kPanelColumns];
  auto fill = [&](Scalar value) {
    if (!is_first) return;
    *h = static_cast<Result>(value);
    for (long i = 0; m != nullptr && i < size; ++i) m[i] = static_cast<Result>(value);
  };
  if (!has_spectrum(trace)) return fill(without_spectrum(trace));
  const Scalar scale = Scalar(1) / trace;
  for_own_parts(group, work.parts, [&](int part) {
    for (int c = 0; c < work.panels; ++c)
      for_rows(part, work.parts, c * kPanelColumns, rows, [&](int begin, int end) {
        Pack* a = work.at(work.a, c, begin);
        for (int r = begin; r < end; ++r) *a++ = gram[c * work.rows + r] * Pack::broadcast(scale);
      });
  });
  if (!tridiagonalise(work, group)) return;
  if (is_first) {
    Scalar s = 1, constant = poles.constant, entropy = resolvents(work, poles, constant, s);
    for (int i = 0; i < kPoleScalings && !(entropy == entropy); ++i) {
      s *= 4;
      constant = poles.constant + __builtin_log(s);
      entropy = resolvents(work, poles, constant, s);
    }
    work.found[0] = entropy;
    work.found[1] = constant;
  }
  if (!group.sync()) return;
  const Scalar entropy = work.found[0], constant = work.found[1];
  if (!(entropy == entropy)) return fill(entropy);
  if (is_first) *h = static_cast<Result>(entropy);
  if (m == nullptr) return;
  sum_all_poles(work, poles.count, group);
  if (!group.sync()) return;
  if (!reflect(work, group)) return;
  // M = -(L + H I) / tr K, L = constant I - F
  for_own_parts(group, work.parts, [&](int part) {
    for_rows(part, work.parts, 0, n, [&](int begin, int end) {
      for (int r = begin; r < end; ++r) {
        Pack* diagonal = work.at(work.f, r / kPanelColumns, r);
        reinterpret_cast<Scalar*>(diagonal)[r % kPanelColumns] -= constant + entropy;
      }
    });
  });
  if (center && !double_center(work, group)) return;
  const Pack factor = Pack::broadcast(scale);
  for_own_parts(group, work.parts, [&](int part) {
    for_panels(part, work.parts, work.panels, [&](int row) {
      for (int column = 0; column <= row; ++column) {
        Pack* block = work.at(work.f, column, row * kPanelColumns);
        for (int r = 0; r < kPanelColumns; ++r) block[r] = block[r] * factor;
        store_symmetric(block, row * kPanelColumns, column * kPanelColumns, n, m);
      }
    });
  });
}

}  // namespace SES_ISA
}  // namespace ses
