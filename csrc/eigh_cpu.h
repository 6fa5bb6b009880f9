// Between the CPU dispatcher and the kernels compiled for each instruction set.
#pragma once

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

// SES_X86: the build compiled eigh_cpu.cpp for these too.
#define SES_DECLARE_ISA(isa)              \
  namespace isa {                         \
  template <typename T>                   \
  const GroupKernels<T>& group_kernels(); \
  }
SES_DECLARE_ISA(portable)
#if defined(SES_X86)
SES_DECLARE_ISA(avx2)
SES_DECLARE_ISA(avx512)
#endif
#undef SES_DECLARE_ISA

}  // namespace ses
