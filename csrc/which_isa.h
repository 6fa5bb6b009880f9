// Which of the instruction sets that the CPU kernels are compiled for (isa.h) this machine has.
#pragma once

#include "isa.h"

namespace ses {

#if defined(SES_X86)
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("fma");
}
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
inline bool has_avx512() { return false; }
inline bool has_avx2() { return false; }
namespace portable {}
namespace avx512 = portable;
namespace avx2 = portable;
#endif

// The kernels of the best one: SES_KERNELS_HERE(rational_kernel<float>).
#define SES_KERNELS_HERE(...)                \
  (ses::has_avx512() ? avx512::__VA_ARGS__() \
   : ses::has_avx2() ? avx2::__VA_ARGS__()   \
                     : portable::__VA_ARGS__())

}  // namespace ses
