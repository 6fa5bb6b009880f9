// Householder tridiagonalisation of one pack of matrices, one matrix a lane, and its orthogonal Q.
//
// Golub and Van Loan, Matrix Computations (4th ed.), 8.3.1; loops in the order of EISPACK tred2,
// where the leading block shrinks and the reflectors stay in the rows they annihilate. For the
// memory system, the rank-2 update of one step and the matrix-vector product of the next are one
// pass, and so are the update of Q by one reflector and the product with the next.
#pragma once

#include "simd-inl.h"

namespace ses {
namespace SES_ISA {

constexpr int kRotationCap = 512;  // logged rotations before they are applied to Q

// A run of logged rotations of columns (i, i + 1), i = high - 1 down to low.
struct QlSweep {
  int low, high, first;
};

// Odd, in cache lines: the rows of a column would else share a few sets of the cache.
constexpr long row_stride(int n) { return n | 1; }

constexpr int rotation_capacity(int n) { return n > kRotationCap / 4 ? 4 * n : kRotationCap; }

template <typename Pack>
struct Workspace {
  Pack* z;          // [n, stride] the matrix, then its reflectors, then Q, then the eigenvectors
  Pack* d;          // [n] diagonal, then eigenvalues
  Pack* e;          // [n] off-diagonal; e[i] couples i and i + 1
  Pack* inverse_h;  // [n] 2 / |u|^2 of the reflector in row i, 0 where there is none
  Pack* p;          // [2, n] p = A u and the q of the pending rank-2 update, in turn
  Pack* rotation;   // [capacity, 2] cosine and sine
  QlSweep* sweep;   // [capacity]
  long stride;

  Pack* row(int i) const { return z + i * stride; }
  static long bytes(int n) {
    const long packs = n * row_stride(n) + 5L * n + 2L * rotation_capacity(n);
    return packs * static_cast<long>(sizeof(Pack)) + rotation_capacity(n) * sizeof(QlSweep);
  }
  Workspace(void* memory, int n) {
    z = static_cast<Pack*>(memory);
    stride = row_stride(n);
    d = z + n * stride;
    e = d + n;
    inverse_h = e + n;
    p = inverse_h + n;
    rotation = p + 2 * n;
    sweep = reinterpret_cast<QlSweep*>(rotation + 2 * rotation_capacity(n));
  }
};

// Four sums at a time: one would wait for itself.
template <typename Pack>
SES_INLINE Pack dot(const Pack* a, const Pack* b, int count) {
  constexpr int kSums = 4;
  Pack sum[kSums];
  for (Pack& value : sum) value = Pack::broadcast(0);
  int k = 0;
  for (; k + kSums <= count; k += kSums)
    for (int i = 0; i < kSums; ++i) sum[i] = fma(a[k + i], b[k + i], sum[i]);
  for (; k < count; ++k) sum[0] = fma(a[k], b[k], sum[0]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Columns [column, column + kColumns) of the lower triangle of the leading block of size `size`:
// a -= u q^T + q u^T for the pending reflector, then p += a next. Both reflectors are zero from
// `inside` on, which no column is beyond.
template <int kColumns, bool kPending, typename Pack>
SES_INLINE void update_and_multiply(Pack* z, long stride, int size, int inside, int column,
                                    const Pack* u, const Pack* q, const Pack* next, Pack* p) {
  Pack u_column[kColumns], q_column[kColumns], next_column[kColumns], sum[kColumns];
  for (int c = 0; c < kColumns; ++c) {
    if (kPending) u_column[c] = u[column + c];
    if (kPending) q_column[c] = q[column + c];
    next_column[c] = next[column + c];
    sum[c] = Pack::broadcast(0);
  }
  // A triangle that the compiler leaves rolled keeps its sums in memory.
#pragma GCC unroll 4
  for (int r = 0; r < kColumns; ++r) {
    Pack* row = z + (column + r) * stride + column;
#pragma GCC unroll 4
    for (int c = 0; c <= r; ++c) {
      Pack a = row[c];
      if (kPending) {
        a = fnma(u_column[r], q_column[c], a);
        a = fnma(q_column[r], u_column[c], a);
        row[c] = a;
      }
      sum[c] = fma(a, next_column[r], sum[c]);
      if (c < r) sum[r] = fma(a, next_column[c], sum[r]);
    }
  }
  // Read before the row is written: to the compiler, u, q and next might be in it.
  for (int k = column + kColumns; k < inside; ++k) {
    Pack* row = z + k * stride + column;
    const Pack next_row = next[k], u_row = kPending ? u[k] : next_row,
               q_row = kPending ? q[k] : u_row;
    Pack row_sum = p[k];
    for (int c = 0; c < kColumns; ++c) {
      Pack a = row[c];
      if (kPending) {
        a = fnma(u_row, q_column[c], a);
        a = fnma(q_row, u_column[c], a);
        row[c] = a;
      }
      sum[c] = fma(a, next_row, sum[c]);
      row_sum = fma(a, next_column[c], row_sum);
    }
    p[k] = row_sum;
  }
  for (int k = inside; k < size; ++k) {
    Pack* row = z + k * stride + column;
    const Pack q_row = kPending ? q[k] : next_column[0];
    Pack row_sum = p[k];
    for (int c = 0; c < kColumns; ++c) {
      Pack a = row[c];
      if (kPending) row[c] = a = fnma(q_row, u_column[c], a);
      row_sum = fma(a, next_column[c], row_sum);
    }
    p[k] = row_sum;
  }
  for (int c = 0; c < kColumns; ++c) p[column + c] = p[column + c] + sum[c];
}

// The lower triangle's columns [0, columns), beyond which both reflectors are zero.
template <bool kPending, typename Pack>
static void update_and_multiply_all(Pack* z, long stride, int size, int columns, const Pack* u,
                                    const Pack* q, const Pack* next, Pack* p) {
  for (int k = 0; k < size; ++k) p[k] = Pack::broadcast(0);
  int column = 0;
  for (; column + 4 <= columns; column += 4)
    update_and_multiply<4, kPending>(z, stride, size, columns, column, u, q, next, p);
  for (; column < columns; ++column)
    update_and_multiply<1, kPending>(z, stride, size, columns, column, u, q, next, p);
}

// Leaves d and e of the tridiagonal, and in row i of z the reflector u of step i.
template <typename Pack>
static void tridiagonalise(const Workspace<Pack>& work, int n) {
  using Scalar = typename Pack::Scalar;
  const Pack zero = Pack::broadcast(0);
  // Below this, squares have lost digits to underflow and would give a reflector that is not
  // orthogonal. The entries dropped instead are below eps^4 of the norm, which is near 1.
  const Pack negligible = Pack::broadcast(
      ScalarTraits<Scalar>::kMinNormal / (ScalarTraits<Scalar>::kEps * ScalarTraits<Scalar>::kEps));
  const Pack* q = nullptr;
  for (int i = n - 1; i >= 1; --i) {
    Pack* row = work.row(i);
    const Pack* u = row + work.stride;
    if (q != nullptr) {
      for (int k = 0; k <= i; ++k) row[k] = fnma(q[i], u[k], fnma(u[i], q[k], row[k]));
    }
    work.d[i] = row[i];
    if (i == 1) break;
    const Pack sigma = dot(row, row, i);
    const Pack f = row[i - 1];
    const Pack g = zero - copysign(sqrt(sigma), f);
    const Pack h = fnma(f, g, sigma);
    const auto skip = sigma < negligible;
    work.e[i - 1] = select(skip, zero, g);
    row[i - 1] = f - g;
    const Pack inverse_h = select(skip, zero, Pack::broadcast(1) / h);
    work.inverse_h[i] = inverse_h;

    Pack* p = work.p + (i % 2) * n;
    if (q == nullptr)
      update_and_multiply_all<false>(work.z, work.stride, i, i, u, q, row, p);
    else
      update_and_multiply_all<true>(work.z, work.stride, i, i, u, q, row, p);
    for (int k = 0; k < i; ++k) p[k] = p[k] * inverse_h;
    const Pack half = Pack::broadcast(Scalar(0.5)) * inverse_h * dot(row, p, i);
    for (int k = 0; k < i; ++k) p[k] = fnma(half, row[k], p[k]);
    q = p;
  }
  Pack* z = work.z;
  if (q != nullptr) {
    const Pack* u = work.row(2);
    z[0] = fnma(q[0], u[0], fnma(u[0], q[0], z[0]));
  }
  work.d[0] = z[0];
  if (n > 1) work.e[0] = z[work.stride];
  work.e[n - 1] = zero;
}

// z[:i, columns] -= u g^T, then g = next^T z.
template <int kColumns, typename Pack>
SES_INLINE void reflect_and_multiply(Pack* z, long stride, int i, int column, const Pack* u,
                                     const Pack* next, Pack inverse_h, Pack* g) {
  Pack g_column[kColumns], sum[kColumns];
  for (int c = 0; c < kColumns; ++c) {
    g_column[c] = g[column + c] * inverse_h;
    sum[c] = Pack::broadcast(0);
  }
  for (int k = 0; k < i; ++k) {
    Pack* row = z + k * stride + column;
    for (int c = 0; c < kColumns; ++c) {
      row[c] = fnma(u[k], g_column[c], row[c]);
      sum[c] = fma(next[k], row[c], sum[c]);
    }
  }
  for (int c = 0; c < kColumns; ++c) g[column + c] = sum[c];
}

// Replaces the reflectors in z by the orthogonal Q with A = Q T Q^T.
template <typename Pack>
static void accumulate(const Workspace<Pack>& work, int n) {
  const Pack zero = Pack::broadcast(0), one = Pack::broadcast(1);
  Pack* z = work.z;
  Pack* g = work.p;
  z[0] = one;
  if (n == 1) return;
  z[1] = zero;
  work.row(1)[0] = zero;
  work.row(1)[1] = one;
  if (n > 2) {
    g[0] = work.row(2)[0];
    g[1] = work.row(2)[1];
  }
  for (int i = 2; i < n; ++i) {
    Pack* u = work.row(i);
    // The last step has no next reflector: its own stands in, and the product goes unused.
    const Pack* next = i + 1 < n ? u + work.stride : u;
    int column = 0;
    for (; column + 4 <= i; column += 4)
      reflect_and_multiply<4>(z, work.stride, i, column, u, next, work.inverse_h[i], g);
    for (; column < i; ++column)
      reflect_and_multiply<1>(z, work.stride, i, column, u, next, work.inverse_h[i], g);
    g[i] = next[i];
    for (int k = 0; k < i; ++k) {
      u[k] = zero;
      work.row(k)[i] = zero;
    }
    u[i] = one;
  }
}

}  // namespace SES_ISA
}  // namespace ses
