// Eigenvalues of a pack of tridiagonal matrices by implicit QL with Wilkinson shifts, one matrix a
// lane, and the rotation of Q into their eigenvectors.
//
// Golub and Van Loan, Matrix Computations (4th ed.), 8.3.3 to 8.3.5; EISPACK tql2. QL runs on the
// tridiagonal alone and logs its rotations, which are then applied to a few rows of Q at a time:
// each row passes through the first-level cache once for many sweeps.
#pragma once

#include "householder-inl.h"
#include "simd-inl.h"

namespace ses {
namespace SES_ISA {

constexpr int kRowBlock = 4;      // rows of Q rotated together: enough chains to fill the FMA units
constexpr int kMaxQlSweeps = 30;  // QL sweeps for each eigenvalue, as in LAPACK

template <int kRows, typename Pack>
SES_INLINE void rotate_rows(Pack* z, long stride, const Pack* rotation, const QlSweep* sweep,
                            int sweeps) {
  for (int s = 0; s < sweeps; ++s) {
    const Pack* cs = rotation + 2 * sweep[s].first;
    Pack carry[kRows];
    for (int r = 0; r < kRows; ++r) carry[r] = z[r * stride + sweep[s].high];
    for (int i = sweep[s].high - 1; i >= sweep[s].low; --i, cs += 2) {
      const Pack cosine = cs[0], sine = cs[1];
      for (int r = 0; r < kRows; ++r) {
        Pack* x = z + r * stride + i;
        const Pack left = x[0];
        x[1] = fma(cosine, carry[r], sine * left);
        carry[r] = fnma(sine, carry[r], cosine * left);
      }
    }
    for (int r = 0; r < kRows; ++r) z[r * stride + sweep[s].low] = carry[r];
  }
}

template <typename Pack>
static void rotate(const Workspace<Pack>& work, int n, int sweeps) {
  int r = 0;
  for (; r + kRowBlock <= n; r += kRowBlock)
    rotate_rows<kRowBlock>(work.row(r), work.stride, work.rotation, work.sweep, sweeps);
  for (; r < n; ++r) rotate_rows<1>(work.row(r), work.stride, work.rotation, work.sweep, sweeps);
}

// The lowest unreduced block [low, high] of each lane (low = high = -1 where all is diagonal), and
// the entries its Wilkinson shift needs. Couplings below the threshold are set to zero.
template <typename Pack>
struct Unreduced {
  Pack low, high, d_low, d_next, e_low, d_high;
};

template <typename Pack>
SES_INLINE Unreduced<Pack> find_block(const Workspace<Pack>& work, int n, Pack floor) {
  using Scalar = typename Pack::Scalar;
  const Pack zero = Pack::broadcast(0), none = Pack::broadcast(-1);
  const Pack eps = Pack::broadcast(ScalarTraits<Scalar>::kEps);
  Unreduced<Pack> block{none, none, zero, zero, zero, zero};
  Pack above = zero;  // e[i + 1]
  for (int i = n - 2; i >= 0; --i) {
    const Pack d0 = work.d[i], d1 = work.d[i + 1];
    const Pack size = abs(work.e[i]);
    const Pack e = select(size <= fma(eps, abs(d0) + abs(d1), floor), zero, work.e[i]);
    work.e[i] = e;
    const auto coupled = e != zero;
    const auto top = both<Pack>(coupled, above == zero);
    block.high = select(top, Pack::broadcast(Scalar(i + 1)), block.high);
    block.d_high = select(top, d1, block.d_high);
    block.low = select(coupled, Pack::broadcast(Scalar(i)), block.low);
    block.d_low = select(coupled, d0, block.d_low);
    block.d_next = select(coupled, d1, block.d_next);
    block.e_low = select(coupled, e, block.e_low);
    above = e;
  }
  return block;
}

// One implicit QL sweep of every lane over its own block, in lockstep over i; outside its block a
// lane logs the identity, so lanes never wait for each other's eigenvalues.
template <typename Pack>
SES_INLINE void ql_sweep(const Workspace<Pack>& work, const Unreduced<Pack>& block, int low,
                         int high, Pack* rotation) {
  using Scalar = typename Pack::Scalar;
  const Pack zero = Pack::broadcast(0), one = Pack::broadcast(1);
  const Pack negligible = Pack::broadcast(
      ScalarTraits<Scalar>::kMinNormal / (ScalarTraits<Scalar>::kEps * ScalarTraits<Scalar>::kEps));
  // Wilkinson's shift, e_low / (g + sign(g) hypot(g, 1)), with the division by e_low multiplied
  // out.
  const Pack half = Pack::broadcast(Scalar(0.5)) * (block.d_next - block.d_low);
  const Pack root = sqrt(fma(half, half, block.e_low * block.e_low));
  const Pack denominator = half + copysign(root, half);
  const Pack shift = select(denominator != zero, block.e_low * (block.e_low / denominator), zero);
  Pack g = block.d_high - block.d_low + shift;
  Pack last_sine = one, last_cosine = one, p = zero;
  for (int i = high - 1; i >= low; --i, rotation += 2) {
    const Pack index = Pack::broadcast(Scalar(i));
    const auto active = both<Pack>(block.low <= index, index < block.high);
    const Pack e0 = work.e[i], d0 = work.d[i], d1 = work.d[i + 1];
    const Pack f = last_sine * e0, b = last_cosine * e0;
    const Pack square = fma(f, f, g * g);
    // A coupling too small to square is dropped: the rotation is then the identity.
    const auto vanished = square < negligible;
    const Pack r = select(vanished, zero, sqrt(square));
    const Pack inverse_r = one / r;
    const Pack sine = select(vanished, zero, f * inverse_r);
    const Pack cosine = select(vanished, one, g * inverse_r);
    const Pack d_shifted = d1 - p;
    const Pack t = fma(d0 - d_shifted, sine, (cosine + cosine) * b);
    const Pack p_new = sine * t;
    const Pack g_new = fma(cosine, t, zero - b);

    const auto first = both<Pack>(active, block.high == index + one);
    const auto last = both<Pack>(active, block.low == index);
    work.e[i + 1] = select(active, select(first, zero, r), work.e[i + 1]);
    work.d[i + 1] = select(active, d_shifted + p_new, d1);
    work.d[i] = select(last, d0 - p_new, d0);
    work.e[i] = select(last, g_new, e0);
    last_sine = select(active, sine, last_sine);
    last_cosine = select(active, cosine, last_cosine);
    p = select(active, p_new, p);
    g = select(active, g_new, g);
    rotation[0] = select(active, cosine, one);
    rotation[1] = select(active, sine, zero);
  }
}

// The widest range [low, high) any lane works on; false when all are diagonal.
template <typename Pack>
SES_INLINE bool union_of(const Unreduced<Pack>& block, int n, int* low, int* high) {
  *low = n;
  *high = 0;
  typename Pack::Scalar lows[Pack::kLanes], highs[Pack::kLanes];
  __builtin_memcpy(lows, &block.low, sizeof(lows));
  __builtin_memcpy(highs, &block.high, sizeof(highs));
  for (int lane = 0; lane < Pack::kLanes; ++lane) {
    const int l = static_cast<int>(lows[lane]), h = static_cast<int>(highs[lane]);
    *low = l >= 0 && l < *low ? l : *low;
    *high = h > *high ? h : *high;
  }
  return *high > 0;
}

// Diagonalises the tridiagonal (d, e) and rotates Q; a lane that did not converge gets NaN.
template <typename Pack>
static void ql(const Workspace<Pack>& work, int n) {
  using Scalar = typename Pack::Scalar;
  Pack norm = Pack::broadcast(0);
  for (int i = 0; i < n; ++i) {
    const Pack size = abs(work.d[i]) + abs(work.e[i]);
    norm = select(norm < size, size, norm);
  }
  // The absolute part lets a rank-deficient block deflate: its diagonal is rounding noise.
  const Pack floor = Pack::broadcast(ScalarTraits<Scalar>::kEps / 4) * norm;
  const int capacity = rotation_capacity(n);
  int logged = 0, sweeps = 0, low, high;
  long budget = static_cast<long>(kMaxQlSweeps) * n;
  Unreduced<Pack> block = find_block(work, n, floor);
  while (union_of(block, n, &low, &high) && budget-- > 0) {
    if (logged + high - low > capacity) {
      rotate(work, n, sweeps);
      logged = sweeps = 0;
    }
    work.sweep[sweeps++] = {low, high, logged};
    ql_sweep(work, block, low, high, work.rotation + 2 * logged);
    logged += high - low;
    block = find_block(work, n, floor);
  }
  rotate(work, n, sweeps);
  const auto failed = Pack::broadcast(0) <= block.low;
  for (int i = 0; i < n; ++i)
    work.d[i] = select(failed, Pack::broadcast(ScalarTraits<Scalar>::kNaN), work.d[i]);
}

// Odd-even transposition: the same comparisons for every lane. `order` gets the column of each.
template <typename Pack>
static void sort_ascending(Pack* d, Pack* order, int n) {
  using Scalar = typename Pack::Scalar;
  for (int i = 0; i < n; ++i) order[i] = Pack::broadcast(Scalar(i));
  for (int round = 0; round < n; ++round) {
    for (int i = round % 2; i + 1 < n; i += 2) {
      const Pack d0 = d[i], d1 = d[i + 1], o0 = order[i], o1 = order[i + 1];
      const auto swap = d1 < d0;
      d[i] = select(swap, d1, d0);
      d[i + 1] = select(swap, d0, d1);
      order[i] = select(swap, o1, o0);
      order[i + 1] = select(swap, o0, o1);
    }
  }
}

}  // namespace SES_ISA
}  // namespace ses
