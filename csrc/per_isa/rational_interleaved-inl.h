// log P by partial fractions for a pack of matrices, one a lane: the faster way for a batch of them
// (arrangement.h). The method is that of rational_panels-inl.h, one reflection at a time. A pack
// holds one bundle or two.
#pragma once

#include "householder-inl.h"
#include "poles-inl.h"
#include "simd-inl.h"
#include "tile-inl.h"

namespace ses {
namespace SES_ISA {

// Poles summed at a time: as many registers for any pack.
template <typename Pack>
constexpr int kInterleavedPoles = kPoleBlock * kBundle / Pack::kLanes;

template <typename Pack>
struct InterleavedWorkspace {
  Workspace<Pack> tridiagonal;
  Pack* f;         // [n, stride] the sum over the poles, lower triangle
  Pack* ratio;     // [n, block] G(k, c) / G(k - 1, c) of a block of resolvents, c < k
  Pack* diagonal;  // [n, block] their weighted diagonals

  static long bytes(int n) {
    return Workspace<Pack>::bytes(n) + kPage +
           static_cast<long>(sizeof(Pack)) * n * (row_stride(n) + 2 * kInterleavedPoles<Pack>);
  }
  InterleavedWorkspace(void* memory, int n) : tridiagonal(memory, n) {
    f = reinterpret_cast<Pack*>(static_cast<char*>(memory) +
                                (Workspace<Pack>::bytes(n) + kPage - 1) / kPage * kPage);
    ratio = f + n * row_stride(n);
    diagonal = ratio + n * kInterleavedPoles<Pack>;
  }

 private:
  static constexpr long kPage = 4096;
};

// s, multiplied by 4 until T + s t_1 I is positive definite; NaN where no s will do. Adds log s to
// the constant.
template <typename Pack>
static Pack pole_scale(const Workspace<Pack>& work, typename Pack::Scalar t, int n,
                       Pack& constant) {
  using Scalar = typename Pack::Scalar;
  const Pack zero = Pack::broadcast(0), one = Pack::broadcast(1);
  Pack s = one;
  for (int attempt = 0; attempt < kPoleScalings; ++attempt) {
    Pack inverse = zero, smallest = one;
    for (int k = n - 1; k >= 0; --k) {
      Pack pivot = fma(s, Pack::broadcast(t), work.d[k]);
      if (k + 1 < n) pivot = fnma(work.e[k] * work.e[k], inverse, pivot);
      smallest = select(zero < pivot, smallest, Pack::broadcast(-1));
      inverse = one / pivot;
    }
    const auto failed = smallest < zero;
    if (!Pack::any(failed)) return s;
    s = select(failed, Pack::broadcast(4) * s, s);
    constant =
        select(failed, constant + Pack::broadcast(1.3862943611198906188), constant);  // log 4
    if (attempt + 1 == kPoleScalings)
      s = select(failed, Pack::broadcast(ScalarTraits<Scalar>::kNaN), s);
  }
  return s;
}

// F += sum_j w_j (T + s t_j I)^{-1} over one block of poles: from U D U^T, so that every entry is
// one multiplication from the one above it.
template <typename Pack>
static void add_poles(const InterleavedWorkspace<Pack>& work, const typename Pack::Scalar* t,
                      const typename Pack::Scalar* weight, Pack s, int n, bool first) {
  constexpr int kPoles = kInterleavedPoles<Pack>;
  const Pack zero = Pack::broadcast(0), one = Pack::broadcast(1);
  const Pack* d = work.tridiagonal.d;
  const Pack* e = work.tridiagonal.e;
  Pack g[kPoles];
  for (int k = n - 1; k >= 0; --k) {
    Pack* ratio = work.ratio + (k + 1) * kPoles;
    for (int j = 0; j < kPoles; ++j) {
      Pack pivot = fma(s, Pack::broadcast(t[j]), d[k]);
      if (k + 1 < n) {
        ratio[j] = zero - e[k] * g[j];
        pivot = fma(ratio[j], e[k], pivot);
      }
      work.diagonal[k * kPoles + j] = g[j] = one / pivot;
    }
  }
  for (int k = 1; k < n; ++k) {
    const Pack* ratio = work.ratio + k * kPoles;
    Pack* diagonal = work.diagonal + k * kPoles;
    for (int j = 0; j < kPoles; ++j)
      diagonal[j] = fma(ratio[j] * ratio[j], diagonal[j - kPoles], diagonal[j]);
  }
  const long stride = work.tridiagonal.stride;
  for (int c = 0; c < n; ++c) {
    for (int j = 0; j < kPoles; ++j)
      g[j] = Pack::broadcast(weight[j]) * s * work.diagonal[c * kPoles + j];
    for (int r = c; r < n; ++r) {
      Pack* out = work.f + r * stride + c;
      Pack sum = first ? zero : *out;
      for (int j = 0; j < kPoles; ++j) {
        if (r > c) g[j] = g[j] * work.ratio[r * kPoles + j];
        sum = sum + g[j];
      }
      *out = sum;
    }
  }
}

// F = Q F Q^T, the reflections in the order opposite to the tridiagonalisation's. Calls before(i)
// ahead of the pass over row i, for all rows from 1.
template <typename Pack, typename Before>
static void reflect(const InterleavedWorkspace<Pack>& work, int n, Before before) {
  if (n < 3) return;
  const Pack zero = Pack::broadcast(0);
  const long stride = work.tridiagonal.stride;
  const Pack* u = nullptr;
  Pack* p = work.tridiagonal.p;
  for (int i = 2; i <= n; ++i) {
    before(i - 1);
    if (i < n) work.tridiagonal.row(i)[i] = zero;  // where u is read once more, in the next pass
    const Pack* next = i < n ? work.tridiagonal.row(i) : u;
    Pack* product = work.tridiagonal.p + (i % 2) * n;
    if (u == nullptr)
      update_and_multiply_all<false>(work.f, stride, n, i, u, p, next, product);
    else
      update_and_multiply_all<true>(work.f, stride, n, i < n ? i : n - 1, u, p, next, product);
    if (i == n) break;
    const Pack h = work.tridiagonal.inverse_h[i];
    for (int k = 0; k < n; ++k) product[k] = product[k] * h;
    const Pack half = Pack::broadcast(0.5) * h * dot(next, product, i);
    for (int k = 0; k < i; ++k) product[k] = fnma(half, next[k], product[k]);
    u = next;
    p = product;
  }
}

// The lower triangles of up to eight matrices [count, n, n], interleaved.
template <typename Pack>
static void interleave(const typename Pack::Scalar* grams, int count, int n, Pack* out) {
  static_assert(Pack::kLanes == kPanelColumns, "a square is transposed");
  const long size = static_cast<long>(n) * n;
  Pack row[kPanelColumns], column[kPanelColumns];
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; j += kPanelColumns) {
      const typename Pack::Scalar* from = grams + static_cast<long>(i) * n + j;
      for (int lane = 0; lane < kBundle; ++lane)
        row[lane] = load<Pack>(from + (lane < count ? lane * size : 0), n - j);
      Square<Pack>::transpose(row, column);
      for (int k = 0; k < kPanelColumns && j + k < n; ++k)
        out[static_cast<long>(i) * n + j + k] = column[k];
    }
  }
}

// The registers of a bundle.
template <typename Pack>
constexpr int kBundleRegisters =
    kBundle * sizeof(typename Pack::Scalar) / sizeof(typename Pack::Vec);
template <typename Pack>
using BundlePack =
    PackOf<typename Pack::Scalar, sizeof(typename Pack::Vec), kBundleRegisters<Pack>>;

// Entry `at` of every matrix, from bundles of `size` entries.
template <typename Pack>
SES_INLINE Pack gather(const BundlePack<Pack>* bundles, long size, long at) {
  constexpr int kRegisters = kBundleRegisters<Pack>;
  Pack x;
  for (int i = 0; i < kRegisters * Pack::kLanes / kBundle; ++i)
    x.r[i] = bundles[i / kRegisters * size + at].r[i % kRegisters];
  return x;
}

// Eight columns of `count` matrices, rows of `size` numbers apart.
template <typename Pack, typename Result>
SES_INLINE void scatter(const Pack* column, Result* first, long size, int count, long columns) {
  constexpr int kRegisters = kBundleRegisters<Pack>;
  for (int bundle = 0; bundle < Pack::kLanes / kBundle; ++bundle) {
    BundlePack<Pack> part[kPanelColumns];
    for (int k = 0; k < kPanelColumns; ++k)
      for (int i = 0; i < kRegisters; ++i) part[k].r[i] = column[k].r[bundle * kRegisters + i];
    Square<BundlePack<Pack>>::transpose(part, part);
    for (int lane = bundle * kBundle; lane < count && lane < (bundle + 1) * kBundle; ++lane)
      store(part[lane % kBundle], first + lane * size, columns);
  }
}

// J F J, J = I - 11^T / n, is F(i, j) - mean[i] - mean[j] with the means of the rows, less half the
// mean of all. Reads both triangles of F.
template <typename Pack>
static void row_means(const InterleavedWorkspace<Pack>& work, int n, Pack* mean) {
  using Scalar = typename Pack::Scalar;
  const Pack inverse = Pack::broadcast(Scalar(1) / static_cast<Scalar>(n));
  Pack half = Pack::broadcast(0);
  for (int i = 0; i < n; ++i) {
    const Pack* row = work.f + i * work.tridiagonal.stride;
    Pack sum = row[0];
    for (int j = 1; j < n; ++j) sum = sum + row[j];
    mean[i] = sum * inverse;
    half = fma(mean[i], Pack::broadcast(Scalar(0.5)) * inverse, half);
  }
  for (int i = 0; i < n; ++i) mean[i] = mean[i] - half;
}

// Up to as many matrices as there are lanes, in bundles [bundles, n, n].
template <typename Pack, typename Result>
static void rational(const BundlePack<Pack>* grams, Result* h, Result* m, int count, int n,
                     bool center, const PaddedPoles<typename Pack::Scalar>& poles, void* memory) {
  using Scalar = typename Pack::Scalar;
  const InterleavedWorkspace<Pack> work(memory, n);
  const Workspace<Pack>& tridiagonal = work.tridiagonal;
  const long size = static_cast<long>(n) * n, stride = tridiagonal.stride;
  const Pack zero = Pack::broadcast(0);
  Pack trace = zero;
  for (int i = 0; i < n; ++i)
    trace = trace + gather<Pack>(grams, size, static_cast<long>(i) * n + i);
  const auto valid = both<Pack>(zero < trace, trace < Pack::broadcast(ScalarTraits<Scalar>::kInf));
  const Pack scale = select(valid, Pack::broadcast(1) / trace, zero);
  for (int i = 0; i < n; ++i) {
    Pack* row = tridiagonal.row(i);
    for (int j = 0; j <= i; ++j)
      row[j] = select(valid, gather<Pack>(grams, size, static_cast<long>(i) * n + j) * scale, zero);
  }
  tridiagonalise(tridiagonal, n);

  Pack constant = Pack::broadcast(poles.constant);
  const Pack s = pole_scale(tridiagonal, poles.t[0], n, constant);
  for (int j = 0; j < poles.count; j += kInterleavedPoles<Pack>)
    add_poles(work, poles.t + j, poles.w + j, s, n, j == 0);
  Pack entropy = zero, sum = zero;  // of the trace of T
  for (int k = 0; k < n; ++k) {
    const Pack* row = work.f + k * stride + k;
    sum = sum + tridiagonal.d[k];
    entropy = fma(tridiagonal.d[k], row[0], entropy);
    if (k > 0) entropy = fma(Pack::broadcast(2) * tridiagonal.e[k - 1], row[-1], entropy);
  }
  entropy = fnma(constant, sum, entropy);
  const Pack none = select(trace == zero, zero, Pack::broadcast(ScalarTraits<Scalar>::kNaN));
  store(select(valid, entropy, none), h, count);
  if (m == nullptr) return;

  // Stores that miss the cache, to as many places as there are matrices, would wait one for
  // another.
  reflect(work, n, [&](int row) {
    for (int lane = 0; lane < count; ++lane)
      prefetch<kWrite>(m + lane * size + static_cast<long>(row) * n, n);
  });
  for (int i = 0; i < n; ++i) {
    Pack* row = work.f + i * stride;
    row[i] = row[i] - (constant + entropy);
    for (int j = 0; j < i; ++j) work.f[j * stride + i] = row[j];
  }
  Pack* mean = tridiagonal.p;
  if (center)
    row_means(work, n, mean);
  else
    for (int i = 0; i < n; ++i) mean[i] = zero;
  const Pack factor = select(valid, scale, none);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; j += kPanelColumns) {
      const Pack* row = work.f + i * stride + j;
      Pack column[kPanelColumns];
      for (int k = 0; k < kPanelColumns; ++k)
        column[k] = (row[k] - (mean[i] + mean[j + k])) * factor;
      scatter(column, m + static_cast<long>(i) * n + j, size, count, n - j);
    }
  }
}

}  // namespace SES_ISA
}  // namespace ses
