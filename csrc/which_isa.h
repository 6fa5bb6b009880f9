// Which of the instruction sets that the CPU kernels are compiled for (isa.h) this machine has, and
// which of those is in use: the best, unless a test or a benchmark wants another.
#pragma once

#include <atomic>

#include "isa.h"

#if defined(SES_X86)
#include <cpuid.h>
#endif

namespace ses {

// The best last.
enum class Isa { kPortable, kAvx2, kAvx512 };
constexpr Isa kIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512};

inline const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "portable";
}

#if defined(SES_X86)
// By cpuid: compilers before GCC 11 do not know the name.
inline bool has_f16c() {
  static const bool found = [] {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  }();
  return found;
}
inline bool runs_here(Isa isa) {
  if (isa == Isa::kPortable) return true;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (isa == Isa::kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}
#else
inline bool runs_here(Isa isa) { return isa == Isa::kPortable; }
namespace portable {}
namespace avx512 = portable;
namespace avx2 = portable;
#endif

inline Isa best_isa() {
  Isa best = Isa::kPortable;
  for (const Isa isa : kIsas)
    if (runs_here(isa)) best = isa;
  return best;
}

// For every thread. A call on which it is changed may run partly on the one and partly on the
// other.
inline std::atomic<Isa>& isa_in_use() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

// The kernels of the one in use: SES_KERNELS_HERE(rational_kernel<float>).
#define SES_KERNELS_HERE(...)                                     \
  (ses::isa_in_use() == ses::Isa::kAvx512 ? avx512::__VA_ARGS__() \
   : ses::isa_in_use() == ses::Isa::kAvx2 ? avx2::__VA_ARGS__()   \
                                          : portable::__VA_ARGS__())

}  // namespace ses
