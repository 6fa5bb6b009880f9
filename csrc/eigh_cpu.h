// Between the CPU dispatcher and the kernels compiled for each instruction set.
#pragma once

#include "isa.h"

namespace ses {

// Solves a bundle: `count` <= `lanes` matrices in lockstep, one a lane, in `workspace_bytes(n)` of
// 64-byte aligned memory.
template <typename Scalar>
struct BundleKernel {
  int lanes;
  int unroll;
  long (*workspace_bytes)(int n);
  void (*run)(const Scalar* a, Scalar* w, Scalar* v, int count, int n, void* workspace);
};

// Two registers of lanes, one, and half a one for batches that would not fill it.
constexpr int kBundleSizes = 3;

template <typename Scalar>
struct BundleKernels {
  BundleKernel<Scalar> of_size[kBundleSizes];  // largest first
};

SES_DECLARE_FOR_EACH_ISA(template <typename Scalar> const BundleKernels<Scalar>& bundle_kernels();)

}  // namespace ses
