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

constexpr int kRowBlock = 4;    // rows of Q rotated together: enough chains to fill the FMA units
constexpr int kMaxSweeps = 30;  // QL sweeps for each eigenvalue, as in LAPACK

template <int kRows, typename P>
SES_INLINE void rotate_rows(P* z, long stride, const P* rotation, const Sweep* sweep, int sweeps) {
  for (int s = 0; s < sweeps; ++s) {
    const P* cs = rotation + 2 * sweep[s].first;
    P carry[kRows];
    for (int r = 0; r < kRows; ++r) carry[r] = z[r * stride + sweep[s].high];
    for (int i = sweep[s].high - 1; i >= sweep[s].low; --i, cs += 2) {
      const P cosine = cs[0], sine = cs[1];
      for (int r = 0; r < kRows; ++r) {
        P* x = z + r * stride + i;
        const P left = x[0];
        x[1] = fma(cosine, carry[r], sine * left);
        carry[r] = fnma(sine, carry[r], cosine * left);
      }
    }
    for (int r = 0; r < kRows; ++r) z[r * stride + sweep[s].low] = carry[r];
  }
}

template <typename P>
static void rotate(const Workspace<P>& work, int n, int sweeps) {
  int r = 0;
  for (; r + kRowBlock <= n; r += kRowBlock)
    rotate_rows<kRowBlock>(work.row(r), work.stride, work.rotation, work.sweep, sweeps);
  for (; r < n; ++r) rotate_rows<1>(work.row(r), work.stride, work.rotation, work.sweep, sweeps);
}

// The lowest unreduced block [low, high] of each lane (low = high = -1 where all is diagonal), and
// the entries its Wilkinson shift needs. Couplings below the threshold are set to zero.
template <typename P>
struct Block {
  P low, high, d_low, d_next, e_low, d_high;
};

template <typename P>
SES_INLINE Block<P> find_block(const Workspace<P>& work, int n, P floor) {
  using T = typename P::Scalar;
  const P zero = P::broadcast(0), none = P::broadcast(-1);
  const P eps = P::broadcast(ScalarTraits<T>::kEps);
  Block<P> block{none, none, zero, zero, zero, zero};
  P above = zero;  // e[i + 1]
  for (int i = n - 2; i >= 0; --i) {
    const P d0 = work.d[i], d1 = work.d[i + 1];
    const P size = abs(work.e[i]);
    const P e = select(size <= fma(eps, abs(d0) + abs(d1), floor), zero, work.e[i]);
    work.e[i] = e;
    const auto coupled = e != zero;
    const auto top = both<P>(coupled, above == zero);
    block.high = select(top, P::broadcast(T(i + 1)), block.high);
    block.d_high = select(top, d1, block.d_high);
    block.low = select(coupled, P::broadcast(T(i)), block.low);
    block.d_low = select(coupled, d0, block.d_low);
    block.d_next = select(coupled, d1, block.d_next);
    block.e_low = select(coupled, e, block.e_low);
    above = e;
  }
  return block;
}

// One implicit QL sweep of every lane over its own block, in lockstep over i; outside its block a
// lane logs the identity, so lanes never wait for each other's eigenvalues.
template <typename P>
SES_INLINE void ql_sweep(const Workspace<P>& work, const Block<P>& block, int low, int high,
                         P* rotation) {
  using T = typename P::Scalar;
  const P zero = P::broadcast(0), one = P::broadcast(1);
  const P negligible =
      P::broadcast(ScalarTraits<T>::kMinNormal / (ScalarTraits<T>::kEps * ScalarTraits<T>::kEps));
  // Wilkinson's shift, e_low / (g + sign(g) hypot(g, 1)), with the division by e_low multiplied
  // out.
  const P half = P::broadcast(T(0.5)) * (block.d_next - block.d_low);
  const P root = sqrt(fma(half, half, block.e_low * block.e_low));
  const P denominator = half + copysign(root, half);
  const P shift = select(denominator != zero, block.e_low * (block.e_low / denominator), zero);
  P g = block.d_high - block.d_low + shift;
  P s = one, c = one, p = zero;
  for (int i = high - 1; i >= low; --i, rotation += 2) {
    const P index = P::broadcast(T(i));
    const auto active = both<P>(block.low <= index, index < block.high);
    const P e0 = work.e[i], d0 = work.d[i], d1 = work.d[i + 1];
    const P f = s * e0, b = c * e0;
    const P square = fma(f, f, g * g);
    // A coupling too small to square is dropped: the rotation is then the identity.
    const auto vanished = square < negligible;
    const P r = select(vanished, zero, sqrt(square));
    const P inverse_r = one / r;
    const P sine = select(vanished, zero, f * inverse_r);
    const P cosine = select(vanished, one, g * inverse_r);
    const P d_shifted = d1 - p;
    const P t = fma(d0 - d_shifted, sine, (cosine + cosine) * b);
    const P p_new = sine * t;
    const P g_new = fma(cosine, t, zero - b);

    const auto first = both<P>(active, block.high == index + one);
    const auto last = both<P>(active, block.low == index);
    work.e[i + 1] = select(active, select(first, zero, r), work.e[i + 1]);
    work.d[i + 1] = select(active, d_shifted + p_new, d1);
    work.d[i] = select(last, d0 - p_new, d0);
    work.e[i] = select(last, g_new, e0);
    s = select(active, sine, s);
    c = select(active, cosine, c);
    p = select(active, p_new, p);
    g = select(active, g_new, g);
    rotation[0] = select(active, cosine, one);
    rotation[1] = select(active, sine, zero);
  }
}

// The widest range [low, high) any lane works on; false when all are diagonal.
template <typename P>
SES_INLINE bool union_of(const Block<P>& block, int n, int* low, int* high) {
  *low = n;
  *high = 0;
  typename P::Scalar lows[P::kLanes], highs[P::kLanes];
  __builtin_memcpy(lows, &block.low, sizeof(lows));
  __builtin_memcpy(highs, &block.high, sizeof(highs));
  for (int lane = 0; lane < P::kLanes; ++lane) {
    const int l = static_cast<int>(lows[lane]), h = static_cast<int>(highs[lane]);
    *low = l >= 0 && l < *low ? l : *low;
    *high = h > *high ? h : *high;
  }
  return *high > 0;
}

// Diagonalises the tridiagonal (d, e) and rotates Q; a lane that did not converge gets NaN.
template <typename P>
static void ql(const Workspace<P>& work, int n) {
  using T = typename P::Scalar;
  P norm = P::broadcast(0);
  for (int i = 0; i < n; ++i) {
    const P size = abs(work.d[i]) + abs(work.e[i]);
    norm = select(norm < size, size, norm);
  }
  // The absolute part lets a rank-deficient block deflate: its diagonal is rounding noise.
  const P floor = P::broadcast(ScalarTraits<T>::kEps / 4) * norm;
  const int capacity = rotation_capacity(n);
  int logged = 0, sweeps = 0, low, high;
  long budget = static_cast<long>(kMaxSweeps) * n;
  Block<P> block = find_block(work, n, floor);
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
  const auto failed = P::broadcast(0) <= block.low;
  for (int i = 0; i < n; ++i)
    work.d[i] = select(failed, P::broadcast(ScalarTraits<T>::kNaN), work.d[i]);
}

// Odd-even transposition: the same comparisons for every lane. `order` gets the column of each.
template <typename P>
static void sort_ascending(P* d, P* order, int n) {
  using T = typename P::Scalar;
  for (int i = 0; i < n; ++i) order[i] = P::broadcast(T(i));
  for (int round = 0; round < n; ++round) {
    for (int i = round % 2; i + 1 < n; i += 2) {
      const P d0 = d[i], d1 = d[i + 1], o0 = order[i], o1 = order[i + 1];
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
