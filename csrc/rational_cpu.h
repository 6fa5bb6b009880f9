// The rational solver on the CPU: what bindings.cpp calls, and what the dispatcher finds in the
// kernels compiled for each instruction set.
#pragma once

#include "arrangement.h"
#include "isa.h"
#include "rational.h"

namespace ses {

// One call for all layers; Result is float or double.
template <typename Result>
void rational_cpu(const GramLayer<double, Result>* layers, int count, const Poles& poles,
                  int threads);

template <typename Result>
struct RationalKernel {
  // [count, n, n], as many as go together; reads the lower triangles. Lanes left over get the first
  // matrix.
  void (*arrange)(Arrangement arrangement, const double* grams, int count, int n, double* out);
  long (*workspace_bytes)(Arrangement arrangement, int n, int pole_count);
  // As many matrices as go together, arranged; their gram and the workspace are aligned to 64
  // bytes.
  void (*run)(Arrangement arrangement, const GramLayer<double, Result>& layer, const Poles& poles,
              void* workspace);
};

SES_DECLARE_FOR_EACH_ISA(template <typename Result>
                         const RationalKernel<Result>& rational_kernel();)

}  // namespace ses
