// The rational solver on the CPU: what bindings.cpp calls, and what the dispatcher finds in the
// kernels compiled for each instruction set.
#pragma once

#include "isa.h"
#include "rational.h"

namespace ses {

// Up to kLanes matrices of this side and less fill the SIMD lanes side by side, larger ones with
// their columns. The former are interleaved: [n, n, kLanes], the lower triangle.
constexpr int kMaxNLanes = 32;

// One call for all layers; M is float or double.
template <typename M>
void rational_cpu(const GramLayer<double, M>* layers, int count, const Poles& poles, int threads);

template <typename M>
struct RationalKernel {
  // [count, n, n] to [n, n, kLanes]; the lanes left over get the first matrix.
  void (*interleave)(const double* grams, int count, int n, double* out);
  long (*workspace_bytes)(int n, int poles);
  // As many matrices as go together: at most kLanes interleaved ones, or one. Its gram and the
  // workspace are aligned to 64 bytes.
  void (*run)(const GramLayer<double, M>& layer, const Poles& poles, void* workspace);
};

SES_DECLARE_FOR_EACH_ISA(template <typename M> const RationalKernel<M>& rational_kernel();)

}  // namespace ses
