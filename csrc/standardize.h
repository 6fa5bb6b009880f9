// Where the samples of a matrix lie and how large they are, and the standardised samples
// Xs = ((x - anchor) - mean offset) * scale, each in one pass over x. CPU only.
#pragma once

#include "eigh_cpu.h"

namespace ses {

// x [batch, rows, columns]: distances in elements between matrices and between rows; a row is
// dense.
template <typename T>
struct Samples {
  const T* x;
  long matrix_stride, row_stride;
  long batch, rows, columns;
};

template <typename T>
struct StandardizeKernels {
  // location [batch, 2, columns] or null for no centring: an anchor, given, and the mean offset
  // from it. scale [batch]: the power of two that brings the largest |x - anchor| into [1/2, 1).
  void (*location_scale)(const Samples<T>& samples, T* location, T* scale);
  // out [batch, rows, columns], contiguous; distances between the matrices' location rows.
  void (*standardize)(const Samples<T>& samples, const T* location, long location_stride,
                      long location_row_stride, const T* scale, T* out);
};

#define SES_DECLARE_ISA(isa)                          \
  namespace isa {                                     \
  template <typename T>                               \
  const StandardizeKernels<T>& standardize_kernels(); \
  }
SES_DECLARE_ISA(portable)
#if defined(SES_X86)
SES_DECLARE_ISA(avx2)
SES_DECLARE_ISA(avx512)
#endif
#undef SES_DECLARE_ISA

// The kernels of the widest instruction set of this machine.
template <typename T>
const StandardizeKernels<T>& standardize_kernels();

}  // namespace ses
