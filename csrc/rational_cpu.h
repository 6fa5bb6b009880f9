// The rational solver on the CPU: what bindings.cpp calls, and what the dispatcher finds in the
// kernels compiled for each instruction set.
#pragma once

#include "isa.h"
#include "rational.h"

namespace ses {

// Matrices of this side and less fill the SIMD lanes side by side, larger ones with their columns.
constexpr int kMaxNLanes = 32;

// One call for all layers; M is float or double.
template <typename M>
void rational_cpu(const GramLayer<double, M>* layers, int count, const Poles& poles, int threads);

template <typename M>
struct RationalKernel {
  int lanes;
  long (*workspace_bytes)(int n, int poles);
  // Matrices [first, first + lanes) of the layer where n <= kMaxNLanes, else matrix `first`, in
  // 64-byte aligned memory.
  void (*run)(const GramLayer<double, M>& layer, long first, const Poles& poles, void* workspace);
};

SES_DECLARE_FOR_EACH_ISA(template <typename M> const RationalKernel<M>& rational_kernel();)

}  // namespace ses
