// Where the samples of a matrix lie and how large they are, the Gram matrix of the standardised
// samples Xs = ((x - anchor) - mean offset) * scale, and the product of a symmetric matrix with
// them. Xs itself is made a block at a time. CPU only.
#pragma once

#include "arrangement.h"
#include "isa.h"

namespace ses {

enum class SampleType { kFloat16, kBfloat16, kFloat32, kFloat64 };

static inline constexpr long itemsize(SampleType type) {
  return type == SampleType::kFloat64 ? 8 : type == SampleType::kFloat32 ? 4 : 2;
}

// x [batch, rows, columns]: distances in elements between matrices and between rows; a row is
// dense.
struct Samples {
  const void* x;
  SampleType type;
  long matrix_stride, row_stride;
  long batch, rows, columns;
};

// location [batch, 2, columns] or null for no centring: an anchor and the mean offset from it; with
// the distances between matrices and between the two. scale [batch].
template <typename Number>
struct Standard {
  const Number* location;
  long matrix_stride, row_stride;
  const Number* scale;
};

// Which rows of x a Gram matrix compares.
enum class Side { kSamples, kFeatures };

// Of samples that are no wider than the floats or doubles that standardise them: widened as they
// are read, and every digit is that of float or double samples of the same values.
template <typename Number>
struct GramKernels {
  // Columns [first, last) of a matrix: the mean offset from its anchor, a row of the samples' type,
  // after the anchor itself in location [2, columns], and the largest |x - anchor|. Null: no
  // centring.
  Number (*locate)(const Samples& samples, long matrix, long first, long last, const void* anchors,
                   long anchor_stride, Number* location);
  // 2^-e with largest = m 2^e, m in [1/2, 1); 1 for 0.
  Number (*inverse_power_of_two)(Number largest);

  // Rows of blocks part, part + parts, ... of K = Xs Xs^T or Xs^T Xs, [n, n], summed in double and
  // rounded once; with the blocks' mirror images.
  long (*gram_bytes)(long n);
  void (*gram_double)(const Samples& samples, const Standard<Number>& standard, Side side,
                      long matrix, int part, int parts, double* gram, void* workspace);
  void (*gram_float)(const Samples& samples, const Standard<Number>& standard, Side side,
                     long matrix, int part, int parts, float* gram, void* workspace);

  // K of matrices [first, first + count), as many as go together.
  long (*arranged_bytes)(Arrangement arrangement, long n);
  void (*gram_arranged)(Arrangement arrangement, const Samples& samples,
                        const Standard<Number>& standard, Side side, long first, int count,
                        double* grams, void* workspace);

  // The share `part` of coefficient M Xs or coefficient Xs M, in the arithmetic of Number, rounded
  // to the samples' type; m [n, n] symmetric, out [rows, columns] contiguous.
  long (*backward_bytes)(long n);
  void (*backward)(const Number* m, const Samples& samples, const Standard<Number>& standard,
                   Number coefficient, Side side, long matrix, int part, int parts, void* out,
                   void* workspace);
};

SES_DECLARE_FOR_EACH_ISA(template <typename Number> const GramKernels<Number>& gram_kernels();)

// ---- what bindings.cpp calls: one call for a batch ----

// anchor: a row for each matrix, or null for no centring; location [batch, 2, columns].
template <typename Number>
void location_scale_cpu(const Samples& samples, const void* anchor, long anchor_stride,
                        Number* location, Number* scale, int threads);

template <typename Number, typename Entry>
void gram_cpu(const Samples& samples, const Standard<Number>& standard, Side side, Entry* gram,
              int threads);

// 2 g scale M Xs or 2 g scale Xs M for each matrix: the gradient of g f(K) with respect to x, where
// M is that of f with respect to K; out [batch, rows, columns] of the samples' type.
template <typename Number>
void gram_backward_cpu(const Number* m, const Samples& samples, const Standard<Number>& standard,
                       const Number* g, long g_stride, Side side, void* out, int threads);

}  // namespace ses
