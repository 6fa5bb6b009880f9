// The rational solver on the CPU: what bindings.cpp calls, and what the dispatcher finds in the
// kernels compiled for each instruction set.
#pragma once

#include "arrangement.h"
#include "group.h"
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
  void (*arrange)(Arrangement arrangement, const double* grams, int count, int n, double* out,
                  const CpuGroup& group);
  long (*workspace_bytes)(Arrangement arrangement, int n, int pole_count, int threads);
  // As many matrices as go together, arranged; their gram and the workspace are aligned to 64
  // bytes. A group of several threads, each of which calls both, is for a matrix in panels, and has
  // at most parts_of(n) of them, a power of two; the caller has it wait in between and after.
  void (*run)(Arrangement arrangement, const GramLayer<double, Result>& layer, const Poles& poles,
              void* workspace, CpuGroup& group);
};

SES_DECLARE_FOR_EACH_ISA(template <typename Result>
                         const RationalKernel<Result>& rational_kernel();)

}  // namespace ses
