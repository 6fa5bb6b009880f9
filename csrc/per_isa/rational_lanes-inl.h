// log P by partial fractions for a pack of matrices, one a lane: the faster way for a batch of them
// (arrangement.h). The method is that of rational_panels-inl.h, one reflection at a time. P, the
// pack, holds one group of eight matrices or more.
#pragma once

#include "householder-inl.h"
#include "poles-inl.h"
#include "simd-inl.h"
#include "tile-inl.h"

namespace ses {
namespace SES_ISA {

// Poles summed at a time: as many registers for any pack.
template <typename P>
constexpr int kLanePoles = kPoleBlock * kPanel / P::kLanes;

template <typename P>
struct LaneWorkspace {
  Workspace<P> tridiagonal;
  P* f;         // [n, stride] the sum over the poles, lower triangle
  P* ratio;     // [n, block] G(k, c) / G(k - 1, c) of a block of resolvents, c < k
  P* diagonal;  // [n, block] their weighted diagonals

  static long bytes(int n) {
    return Workspace<P>::bytes(n) + kPage +
           static_cast<long>(sizeof(P)) * n * (row_stride(n) + 2 * kLanePoles<P>);
  }
  LaneWorkspace(void* memory, int n) : tridiagonal(memory, n) {
    f = reinterpret_cast<P*>(static_cast<char*>(memory) +
                             (Workspace<P>::bytes(n) + kPage - 1) / kPage * kPage);
    ratio = f + n * row_stride(n);
    diagonal = ratio + n * kLanePoles<P>;
  }

 private:
  static constexpr long kPage = 4096;
};

// s, multiplied by 4 until T + s t_1 I is positive definite; NaN where no s will do. Adds log s to
// c.
template <typename P>
static P pole_scale(const Workspace<P>& work, typename P::Scalar t, int n, P& c) {
  using T = typename P::Scalar;
  const P zero = P::broadcast(0), one = P::broadcast(1);
  P s = one;
  for (int attempt = 0; attempt < kPoleScalings; ++attempt) {
    P inverse = zero, smallest = one;
    for (int k = n - 1; k >= 0; --k) {
      P pivot = fma(s, P::broadcast(t), work.d[k]);
      if (k + 1 < n) pivot = fnma(work.e[k] * work.e[k], inverse, pivot);
      smallest = select(zero < pivot, smallest, P::broadcast(-1));
      inverse = one / pivot;
    }
    const auto failed = smallest < zero;
    if (!P::any(failed)) return s;
    s = select(failed, P::broadcast(4) * s, s);
    c = select(failed, c + P::broadcast(1.3862943611198906188), c);  // log 4
    if (attempt + 1 == kPoleScalings) s = select(failed, P::broadcast(ScalarTraits<T>::kNaN), s);
  }
  return s;
}

// F += sum_j w_j (T + s t_j I)^{-1} over one block of poles: from U D U^T, so that every entry is
// one multiplication from the one above it.
template <typename P>
static void add_poles(const LaneWorkspace<P>& work, const typename P::Scalar* t,
                      const typename P::Scalar* weight, P s, int n, bool first) {
  constexpr int kBlock = kLanePoles<P>;
  const P zero = P::broadcast(0), one = P::broadcast(1);
  const P* d = work.tridiagonal.d;
  const P* e = work.tridiagonal.e;
  P g[kBlock];
  for (int k = n - 1; k >= 0; --k) {
    P* ratio = work.ratio + (k + 1) * kBlock;
    for (int j = 0; j < kBlock; ++j) {
      P pivot = fma(s, P::broadcast(t[j]), d[k]);
      if (k + 1 < n) {
        ratio[j] = zero - e[k] * g[j];
        pivot = fma(ratio[j], e[k], pivot);
      }
      work.diagonal[k * kBlock + j] = g[j] = one / pivot;
    }
  }
  for (int k = 1; k < n; ++k) {
    const P* ratio = work.ratio + k * kBlock;
    P* diagonal = work.diagonal + k * kBlock;
    for (int j = 0; j < kBlock; ++j)
      diagonal[j] = fma(ratio[j] * ratio[j], diagonal[j - kBlock], diagonal[j]);
  }
  const long stride = work.tridiagonal.stride;
  for (int c = 0; c < n; ++c) {
    for (int j = 0; j < kBlock; ++j)
      g[j] = P::broadcast(weight[j]) * s * work.diagonal[c * kBlock + j];
    for (int r = c; r < n; ++r) {
      P* out = work.f + r * stride + c;
      P sum = first ? zero : *out;
      for (int j = 0; j < kBlock; ++j) {
        if (r > c) g[j] = g[j] * work.ratio[r * kBlock + j];
        sum = sum + g[j];
      }
      *out = sum;
    }
  }
}

// F = Q F Q^T, the reflections in the order opposite to the tridiagonalisation's. Calls before(i)
// ahead of the pass over row i, for all rows from 1.
template <typename P, typename Before>
static void reflect(const LaneWorkspace<P>& work, int n, Before before) {
  if (n < 3) return;
  const P zero = P::broadcast(0);
  const long stride = work.tridiagonal.stride;
  const P* u = nullptr;
  P* p = work.tridiagonal.p;
  for (int i = 2; i <= n; ++i) {
    before(i - 1);
    if (i < n) work.tridiagonal.row(i)[i] = zero;  // where u is read once more, in the next pass
    const P* next = i < n ? work.tridiagonal.row(i) : u;
    P* product = work.tridiagonal.p + (i % 2) * n;
    if (u == nullptr)
      update_and_multiply_all<false>(work.f, stride, n, i, u, p, next, product);
    else
      update_and_multiply_all<true>(work.f, stride, n, i < n ? i : n - 1, u, p, next, product);
    if (i == n) break;
    const P h = work.tridiagonal.inverse_h[i];
    for (int k = 0; k < n; ++k) product[k] = product[k] * h;
    const P half = P::broadcast(0.5) * h * dot(next, product, i);
    for (int k = 0; k < i; ++k) product[k] = fnma(half, next[k], product[k]);
    u = next;
    p = product;
  }
}

// The lower triangles of up to eight matrices [count, n, n], interleaved.
template <typename P>
static void interleave(const typename P::Scalar* grams, int count, int n, P* out) {
  static_assert(P::kLanes == kPanel, "a square is transposed");
  const long size = static_cast<long>(n) * n;
  P row[kPanel], column[kPanel];
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; j += kPanel) {
      const typename P::Scalar* from = grams + static_cast<long>(i) * n + j;
      for (int lane = 0; lane < kPanel; ++lane)
        row[lane] = load<P>(from + (lane < count ? lane * size : 0), n - j);
      Square<P>::transpose(row, column);
      for (int k = 0; k < kPanel && j + k < n; ++k)
        out[static_cast<long>(i) * n + j + k] = column[k];
    }
  }
}

// The registers of a group of eight matrices.
template <typename P>
constexpr int kGroupRegisters = kPanel * sizeof(typename P::Scalar) / sizeof(typename P::Vec);
template <typename P>
using Group = Pack<typename P::Scalar, sizeof(typename P::Vec), kGroupRegisters<P>>;

// Entry `at` of every matrix, from groups of `size` entries.
template <typename P>
SES_INLINE P gather(const Group<P>* groups, long size, long at) {
  constexpr int kRegisters = kGroupRegisters<P>;
  P x;
  for (int i = 0; i < kRegisters * P::kLanes / kPanel; ++i)
    x.r[i] = groups[i / kRegisters * size + at].r[i % kRegisters];
  return x;
}

// Eight columns of `count` matrices, rows of `size` numbers apart.
template <typename P, typename M>
SES_INLINE void scatter(const P* column, M* first, long size, int count, long columns) {
  constexpr int kRegisters = kGroupRegisters<P>;
  for (int group = 0; group < P::kLanes / kPanel; ++group) {
    Group<P> part[kPanel];
    for (int k = 0; k < kPanel; ++k)
      for (int i = 0; i < kRegisters; ++i) part[k].r[i] = column[k].r[group * kRegisters + i];
    Square<Group<P>>::transpose(part, part);
    for (int lane = group * kPanel; lane < count && lane < (group + 1) * kPanel; ++lane)
      store(part[lane % kPanel], first + lane * size, columns);
  }
}

// J F J, J = I - 11^T / n, is F(i, j) - mean[i] - mean[j] with the means of the rows, less half the
// mean of all. Reads both triangles of F.
template <typename P>
static void row_means(const LaneWorkspace<P>& work, int n, P* mean) {
  using T = typename P::Scalar;
  const P inverse = P::broadcast(T(1) / static_cast<T>(n));
  P half = P::broadcast(0);
  for (int i = 0; i < n; ++i) {
    const P* row = work.f + i * work.tridiagonal.stride;
    P sum = row[0];
    for (int j = 1; j < n; ++j) sum = sum + row[j];
    mean[i] = sum * inverse;
    half = fma(mean[i], P::broadcast(T(0.5)) * inverse, half);
  }
  for (int i = 0; i < n; ++i) mean[i] = mean[i] - half;
}

// Up to as many matrices as there are lanes, in groups [groups, n, n].
template <typename P, typename M>
static void rational(const Group<P>* grams, M* h, M* m, int count, int n, bool center,
                     const PaddedPoles<typename P::Scalar>& poles, void* memory) {
  using T = typename P::Scalar;
  const LaneWorkspace<P> work(memory, n);
  const Workspace<P>& tridiagonal = work.tridiagonal;
  const long size = static_cast<long>(n) * n, stride = tridiagonal.stride;
  const P zero = P::broadcast(0);
  P trace = zero;
  for (int i = 0; i < n; ++i) trace = trace + gather<P>(grams, size, static_cast<long>(i) * n + i);
  const auto valid = both<P>(zero < trace, trace < P::broadcast(ScalarTraits<T>::kInf));
  const P scale = select(valid, P::broadcast(1) / trace, zero);
  for (int i = 0; i < n; ++i) {
    P* row = tridiagonal.row(i);
    for (int j = 0; j <= i; ++j)
      row[j] = select(valid, gather<P>(grams, size, static_cast<long>(i) * n + j) * scale, zero);
  }
  tridiagonalise(tridiagonal, n);

  P c = P::broadcast(poles.c);
  const P s = pole_scale(tridiagonal, poles.t[0], n, c);
  for (int j = 0; j < poles.count; j += kLanePoles<P>)
    add_poles(work, poles.t + j, poles.w + j, s, n, j == 0);
  P entropy = zero, sum = zero;  // of the trace of T
  for (int k = 0; k < n; ++k) {
    const P* row = work.f + k * stride + k;
    sum = sum + tridiagonal.d[k];
    entropy = fma(tridiagonal.d[k], row[0], entropy);
    if (k > 0) entropy = fma(P::broadcast(2) * tridiagonal.e[k - 1], row[-1], entropy);
  }
  entropy = fnma(c, sum, entropy);
  const P none = select(trace == zero, zero, P::broadcast(ScalarTraits<T>::kNaN));
  store(select(valid, entropy, none), h, count);
  if (m == nullptr) return;

  // Stores that miss the cache, to as many places as there are matrices, would wait one for
  // another.
  reflect(work, n, [&](int row) {
    for (int lane = 0; lane < count; ++lane)
      prefetch<kWrite>(m + lane * size + static_cast<long>(row) * n, n);
  });
  for (int i = 0; i < n; ++i) {
    P* row = work.f + i * stride;
    row[i] = row[i] - (c + entropy);
    for (int j = 0; j < i; ++j) work.f[j * stride + i] = row[j];
  }
  P* mean = tridiagonal.p;
  if (center)
    row_means(work, n, mean);
  else
    for (int i = 0; i < n; ++i) mean[i] = zero;
  const P factor = select(valid, scale, none);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; j += kPanel) {
      const P* row = work.f + i * stride + j;
      P column[kPanel];
      for (int k = 0; k < kPanel; ++k) column[k] = (row[k] - (mean[i] + mean[j + k])) * factor;
      scatter(column, m + static_cast<long>(i) * n + j, size, count, n - j);
    }
  }
}

}  // namespace SES_ISA
}  // namespace ses
