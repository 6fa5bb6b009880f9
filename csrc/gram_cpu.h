// Where the samples of a matrix lie and how large they are, the Gram matrix of the standardised
// samples Xs = ((x - anchor) - mean offset) * scale, and the product of a symmetric matrix with
// them. Xs itself is made a block at a time. CPU only.
#pragma once

#include "arrangement.h"
#include "isa.h"

namespace ses {

// x [batch, rows, columns]: distances in elements between matrices and between rows; a row is
// dense.
template <typename T>
struct Samples {
  const T* x;
  long matrix_stride, row_stride;
  long batch, rows, columns;
};

// location [batch, 2, columns] or null for no centring: an anchor and the mean offset from it; with
// the distances between matrices and between the two. scale [batch].
template <typename L>
struct Standard {
  const L* location;
  long matrix_stride, row_stride;
  const L* scale;
};

// Which rows of x a Gram matrix compares.
enum class Side { kSamples, kFeatures };

// Of float or double samples x, standardised by floats or doubles.
template <typename X, typename L>
struct GramKernels {
  // Columns [first, last) of a matrix: the mean offset from `anchor`, after the anchor itself in
  // location [2, columns], and the largest |x - anchor|. Null anchor: no centring.
  L (*locate)(const Samples<X>& samples, long matrix, long first, long last, const X* anchor,
              L* location);
  // 2^-e with largest = m 2^e, m in [1/2, 1); 1 for 0.
  L (*inverse_power_of_two)(L largest);

  // Rows of blocks part, part + parts, ... of K = Xs Xs^T or Xs^T Xs, [n, n], summed in double and
  // rounded once; with the blocks' mirror images.
  long (*gram_bytes)(long n);
  void (*gram_double)(const Samples<X>& samples, const Standard<L>& standard, Side side,
                      long matrix, int part, int parts, double* gram, void* workspace);
  void (*gram_float)(const Samples<X>& samples, const Standard<L>& standard, Side side, long matrix,
                     int part, int parts, float* gram, void* workspace);

  // K of matrices [first, first + count), as many as go together.
  long (*arranged_bytes)(Arrangement arrangement, long n);
  void (*gram_arranged)(Arrangement arrangement, const Samples<X>& samples,
                        const Standard<L>& standard, Side side, long first, int count,
                        double* grams, void* workspace);

  // The share `part` of coefficient M Xs or coefficient Xs M, in the arithmetic of L; m [n, n]
  // symmetric, out [rows, columns] contiguous.
  long (*backward_bytes)(long n);
  void (*backward)(const L* m, const Samples<X>& samples, const Standard<L>& standard,
                   L coefficient, Side side, long matrix, int part, int parts, X* out,
                   void* workspace);
};

SES_DECLARE_FOR_EACH_ISA(template <typename X, typename L> const GramKernels<X, L>& gram_kernels();)

// ---- what bindings.cpp calls: one call for a batch ----

// anchor: a row for each matrix, or null for no centring; location [batch, 2, columns].
template <typename X, typename L>
void location_scale_cpu(const Samples<X>& samples, const X* anchor, long anchor_stride, L* location,
                        L* scale, int threads);

template <typename X, typename L, typename K>
void gram_cpu(const Samples<X>& samples, const Standard<L>& standard, Side side, K* gram,
              int threads);

// 2 g scale M Xs or 2 g scale Xs M for each matrix: the gradient of g f(K) with respect to x, where
// M is that of f with respect to K.
template <typename X, typename L>
void gram_backward_cpu(const L* m, const Samples<X>& samples, const Standard<L>& standard,
                       const L* g, long g_stride, Side side, X* out, int threads);

}  // namespace ses
