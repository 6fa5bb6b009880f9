// The rational solver on the CPU: what bindings.cpp calls, and what the dispatcher finds in the
// kernels compiled for each instruction set.
#pragma once

#include "arrangement.h"
#include "isa.h"
#include "rational.h"

namespace ses {

// One call for all layers; M is float or double.
template <typename M>
void rational_cpu(const GramLayer<double, M>* layers, int count, const Poles& poles, int threads);

template <typename M>
struct RationalKernel {
  // [count, n, n], as many as go together; reads the lower triangles. Lanes left over get the first
  // matrix.
  void (*arrange)(Arrangement arrangement, const double* grams, int count, int n, double* out);
  long (*workspace_bytes)(Arrangement arrangement, int n, int poles);
  // As many matrices as go together, arranged; their gram and the workspace are aligned to 64
  // bytes.
  void (*run)(Arrangement arrangement, const GramLayer<double, M>& layer, const Poles& poles,
              void* workspace);
};

SES_DECLARE_FOR_EACH_ISA(template <typename M> const RationalKernel<M>& rational_kernel();)

}  // namespace ses
