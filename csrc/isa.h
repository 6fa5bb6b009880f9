// The instruction sets that the CPU kernels are compiled for, each in a namespace of its own.
#pragma once

// SES_X86: the build compiled them for AVX2 and AVX-512 too.
#if defined(SES_X86)
#define SES_DECLARE_FOR_EACH_ISA(...) \
  namespace portable {                \
  __VA_ARGS__                         \
  }                                   \
  namespace avx2 {                    \
  __VA_ARGS__                         \
  }                                   \
  namespace avx512 {                  \
  __VA_ARGS__                         \
  }
#else
#define SES_DECLARE_FOR_EACH_ISA(...) \
  namespace portable {                \
  __VA_ARGS__                         \
  }
#endif
