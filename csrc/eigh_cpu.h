// Between the CPU dispatcher and the kernels compiled for each instruction set.
#pragma once

#include "isa.h"

namespace ses {

// Solves `count` <= `lanes` matrices in lockstep, in `workspace_bytes(n)` of 64-byte aligned
// memory.
template <typename T>
struct GroupKernel {
  int lanes;
  int unroll;
  long (*workspace_bytes)(int n);
  void (*run)(const T* a, T* w, T* v, int count, int n, void* workspace);
};

// Two registers of lanes, one, and half a one for batches that would not fill it.
constexpr int kGroupWidths = 3;

template <typename T>
struct GroupKernels {
  GroupKernel<T> width[kGroupWidths];  // widest first
};

SES_DECLARE_FOR_EACH_ISA(template <typename T> const GroupKernels<T>& group_kernels();)

}  // namespace ses
