// Symmetric eigendecomposition by parallel cyclic Jacobi: two-sided rotations, one group of threads
// a matrix, everything in memory the group shares.
//
// Golub and Van Loan, Matrix Computations (4th ed.), 8.5; the pairs of a round are disjoint, in the
// round-robin order of Brent and Luk (SIAM J. Sci. Stat. Comput. 6, 1985), so that a sweep is
// (players - 1) rounds of players / 2 rotations at once. An odd n gets one virtual player whose row
// and column are zero and hence never rotated.
//
// Each 2 x 2 block of a round is the work of one thread and reads nothing another writes: the
// digits do not depend on the number of threads. Where a product is added to it is fused by name,
// so that they do not depend on the compiler either.
#pragma once

#include <math.h>

#include "eigh.h"
#include "group.h"

namespace ses {
namespace jacobi {

// Quadratic convergence takes 6 to 10 sweeps; a matrix that needs more than this gets NaN.
constexpr int kMaxSweeps = 30;

SES_HOST_DEVICE inline float square_root(float x) { return sqrtf(x); }
SES_HOST_DEVICE inline double square_root(double x) { return sqrt(x); }
SES_HOST_DEVICE inline float fused(float x, float y, float z) { return fmaf(x, y, z); }  // x y + z
SES_HOST_DEVICE inline double fused(double x, double y, double z) { return fma(x, y, z); }
SES_HOST_DEVICE inline float magnitude(float x) { return fabsf(x); }
SES_HOST_DEVICE inline double magnitude(double x) { return fabs(x); }
SES_HOST_DEVICE inline int exponent_of(float x) { return ilogbf(x); }
SES_HOST_DEVICE inline int exponent_of(double x) { return ilogb(x); }
SES_HOST_DEVICE inline float times_power_of_two(float x, int k) { return scalbnf(x, k); }
SES_HOST_DEVICE inline double times_power_of_two(double x, int k) { return scalbn(x, k); }

template <typename Scalar>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kEps = 1.1920929e-7f;
  static constexpr float kMax = 3.4028235e38f;
};
template <>
struct Limits<double> {
  static constexpr double kEps = 2.220446049250313e-16;
  static constexpr double kMax = 1.7976931348623157e308;
};

struct Pair {
  int p, q;  // p < q
};

// Pair k of a round: the last player stays, the others turn around the table.
SES_HOST_DEVICE inline Pair tournament(int round, int k, int players) {
  const int seats = players - 1;
  if (k == 0) return {round, seats};
  const int x = round + k < seats ? round + k : round + k - seats;
  const int y = round - k >= 0 ? round - k : round - k + seats;
  return x < y ? Pair{x, y} : Pair{y, x};
}

// The (outer, inner) of a flat index that steps by the size of the group, without dividing again.
struct FlatIndex {
  int outer, inner, outer_step, inner_step, extent;

  SES_HOST_DEVICE FlatIndex(int first, int step, int inner_extent)
      : outer(first / inner_extent),
        inner(first % inner_extent),
        outer_step(step / inner_extent),
        inner_step(step % inner_extent),
        extent(inner_extent) {}
  SES_HOST_DEVICE void next() {
    outer += outer_step;
    inner += inner_step;
    if (inner >= extent) {
      inner -= extent;
      ++outer;
    }
  }
};

// A rotation by the angle phi as Rutishauser writes it (Numer. Math. 9, 1966), s = sin phi and
// tau = tan(phi / 2) = s / (1 + cos phi): what it changes is computed, not what it leaves. With cos
// phi rounded, to 1 for a small angle, every rotation would lengthen the vectors by up to s^2 / 2.
template <typename Scalar>
struct Rotation {
  Scalar s, tau;

  // (x, y) <- (cos phi x - s y, s x + cos phi y)
  SES_HOST_DEVICE void apply(Scalar& x, Scalar& y) const {
    const Scalar old_x = x;
    x = fused(-s, fused(tau, x, y), x);
    y = fused(s, fused(-tau, y, old_x), y);
  }
};

// Chooses the rotation that annihilates a[p, q], applies it to the diagonal, and reports whether
// there was anything to annihilate.
template <typename Scalar>
SES_HOST_DEVICE bool make_rotation(Scalar* a, int players, Pair pair, Rotation<Scalar>* rotation) {
  Scalar* pp = a + pair.p * players + pair.p;
  Scalar* qq = a + pair.q * players + pair.q;
  Scalar* pq = a + pair.p * players + pair.q;
  const Scalar apq = *pq, size = magnitude(apq);
  // Relative to the pair's own diagonal, so that a graded matrix keeps its small eigenvalues; and
  // to the norm, which is near 1, so that a singular one converges.
  const Scalar eps = Limits<Scalar>::kEps;
  if (size <= eps / 4 || size * size <= (eps * eps) * magnitude(*pp) * magnitude(*qq)) {
    *rotation = {Scalar(0), Scalar(0)};
    return false;
  }
  // The smaller of the two angles: t = tan phi, |t| <= 1.
  const Scalar theta = (*qq - *pp) / (2 * apq);
  const Scalar root = magnitude(theta) + square_root(fused(theta, theta, Scalar(1)));
  const Scalar t = (theta < 0 ? Scalar(-1) : Scalar(1)) / root;
  const Scalar cosine = 1 / square_root(fused(t, t, Scalar(1))), s = t * cosine;
  *rotation = {s, s / (1 + cosine)};
  *pp = fused(-t, apq, *pp);
  *qq = fused(t, apq, *qq);
  *pq = Scalar(0);
  a[pair.q * players + pair.p] = Scalar(0);
  return true;
}

// a' = J_k^T a J_l for the 2 x 2 block where the rows of pair k meet the columns of pair l, and its
// mirror image.
template <typename Scalar>
SES_HOST_DEVICE void rotate_block(Scalar* a, int players, Pair k, Pair l,
                                  Rotation<Scalar> rotation_k, Rotation<Scalar> rotation_l) {
  if (rotation_k.s == 0 && rotation_l.s == 0) return;
  Scalar pp = a[k.p * players + l.p], pq = a[k.p * players + l.q];
  Scalar qp = a[k.q * players + l.p], qq = a[k.q * players + l.q];
  rotation_k.apply(pp, qp);
  rotation_k.apply(pq, qq);
  rotation_l.apply(pp, pq);
  rotation_l.apply(qp, qq);
  a[k.p * players + l.p] = a[l.p * players + k.p] = pp;
  a[k.p * players + l.q] = a[l.q * players + k.p] = pq;
  a[k.q * players + l.p] = a[l.p * players + k.q] = qp;
  a[k.q * players + l.q] = a[l.q * players + k.q] = qq;
}

// Copies the lower triangle, scaled by a power of two so that squares stay in range, and sets v to
// the identity. Returns whether all was finite; *exponent is that of the largest entry.
template <typename Scalar, typename Group>
SES_HOST_DEVICE bool load(const Group& group, const Scalar* input, int n, int players, Scalar* a,
                          Scalar* v, Scalar* scratch, int* exponent) {
  const int rank = group.thread_rank(), threads = group.num_threads();
  for (FlatIndex at(rank, threads, players); at.outer < players; at.next()) {
    const int i = at.outer, j = at.inner;
    v[i * players + j] = Scalar(i == j);
    if (j > i) continue;
    const Scalar x = i < n ? input[static_cast<size_t>(i) * n + j] : Scalar(0);
    a[i * players + j] = x;
    a[j * players + i] = x;
  }
  group.sync();
  for (int j = rank; j < players; j += threads) {
    Scalar largest = 0;
    for (int i = 0; i < players; ++i) {
      const Scalar x = magnitude(a[i * players + j]);
      largest = x > largest || x != x ? x : largest;  // a NaN stays: nothing is above it
    }
    scratch[j] = largest;
  }
  group.sync();
  Scalar largest = 0;
  for (int j = 0; j < players; ++j) {
    const Scalar x = scratch[j];
    largest = x > largest || x != x ? x : largest;
  }
  if (!(largest <= Limits<Scalar>::kMax)) return false;
  *exponent = largest > 0 ? exponent_of(largest) : 0;
  for (int i = rank; i < players * players; i += threads)
    a[i] = times_power_of_two(a[i], -*exponent);
  group.sync();
  return true;
}

// Rotates until a sweep finds nothing to annihilate; false if that never happens.
template <typename Scalar, typename Group>
SES_HOST_DEVICE bool diagonalise(const Group& group, int n, int players, Scalar* a, Scalar* v,
                                 Rotation<Scalar>* rotations) {
  const int rank = group.thread_rank(), threads = group.num_threads();
  const int pairs = players / 2;
  // Blocks (k, k + 1), (k, k + 2), ... around the circle: each unordered pair of pairs once.
  const int blocks = pairs * (pairs - 1) / 2;
  const FlatIndex start(rank, threads, pairs);
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    bool rotated = false;
    for (int round = 0; round < players - 1; ++round) {
      bool mine = false;
      for (int k = rank; k < pairs; k += threads)
        mine |= make_rotation(a, players, tournament(round, k, players), rotations + k);
      if (!group.any(mine)) continue;
      rotated = true;
      FlatIndex at = start;
      for (int i = rank; i < blocks; i += threads, at.next()) {
        const int k = at.inner, next = k + 1 + at.outer, l = next < pairs ? next : next - pairs;
        rotate_block(a, players, tournament(round, k, players), tournament(round, l, players),
                     rotations[k], rotations[l]);
      }
      for (at = start; at.outer < n; at.next()) {
        if (rotations[at.inner].s == 0) continue;
        const Pair pair = tournament(round, at.inner, players);
        Scalar* row = v + at.outer * players;
        rotations[at.inner].apply(row[pair.p], row[pair.q]);
      }
      group.sync();
    }
    if (!rotated) return true;
  }
  return false;
}

// One matrix. `shared` is jacobi_shared_bytes(n, sizeof(Scalar)) of memory the whole group sees.
template <typename Scalar, typename Group>
SES_HOST_DEVICE void eigh(const Group& group, const Scalar* input, Scalar* w, Scalar* output, int n,
                          Scalar* shared) {
  static_assert(sizeof(int) <= sizeof(Scalar), "the order of the columns shares the scratch row");
  const int rank = group.thread_rank(), threads = group.num_threads();
  const int players = jacobi_players(n);
  Scalar* a = shared;                 // [players, players]
  Scalar* v = a + players * players;  // [players, players]
  Scalar* scratch =
      v + players * players;  // [players]: column maxima, then rotations, then the order
  int exponent = 0;
  const bool solved =
      load(group, input, n, players, a, v, scratch, &exponent) &&
      diagonalise(group, n, players, a, v, reinterpret_cast<Rotation<Scalar>*>(scratch));
  if (!solved) {
    for (int i = rank; i < n * n; i += threads) output[i] = static_cast<Scalar>(NAN);
    for (int i = rank; i < n; i += threads) w[i] = static_cast<Scalar>(NAN);
    return;
  }
  // Every thread ranks its own eigenvalues by counting: no exchange, and ties keep their order.
  int* order = reinterpret_cast<int*>(scratch);  // [n]
  for (int j = rank; j < n; j += threads) {
    const Scalar value = a[j * players + j];
    int position = 0;
    for (int i = 0; i < n; ++i) {
      const Scalar other = a[i * players + i];
      position += other < value || (other == value && i < j);
    }
    w[position] = times_power_of_two(value, exponent);
    order[position] = j;
  }
  group.sync();
  for (FlatIndex at(rank, threads, n); at.outer < n; at.next())
    output[at.outer * n + at.inner] = v[at.inner * players + order[at.outer]];
}

}  // namespace jacobi
}  // namespace ses
