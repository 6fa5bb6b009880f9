// Two loops of fixed work, by whose time a busy hour shows. Compiled and timed by bench/host.py.

// `count` additions, each of which waits for the one before: a cycle each. Of registers, because
// some cores add a constant for nothing.
extern "C" long additions(long count) {
  long sum = 0, one = 1;
  for (long i = 0; i < count; i += 8) {
#define ADD                                \
  asm volatile("" : "+r"(sum), "+r"(one)); \
  sum += one;
    ADD ADD ADD ADD ADD ADD ADD ADD
#undef ADD
  }
  return sum;
}

// `count` multiply-adds on each of 12 registers, enough to keep the units busy that a neighbour on
// the same core would take.
#define MULTIPLY_ADDS(name, bytes, ...)                                                     \
  __VA_ARGS__ static void name(long count) {                                                \
    typedef float Register __attribute__((vector_size(bytes)));                             \
    Register x[12] = {}, half = {}, one = {};                                               \
    half += 0.5f;                                                                           \
    one += 1.0f;                                                                            \
    for (Register& y : x) asm volatile("" : "+m"(y)); /* unknown: twelve that may differ */ \
    for (long i = 0; i < count; ++i)                                                        \
      for (Register& y : x) y = y * half + one;                                             \
    for (Register& y : x) asm volatile("" : "+m"(y));                                       \
  }

MULTIPLY_ADDS(narrow, 16)
#if defined(__x86_64__)
MULTIPLY_ADDS(avx2, 32, __attribute__((target("avx2,fma"))))
MULTIPLY_ADDS(avx512, 64, __attribute__((target("avx512f"))))
#endif

// Bytes of a register: 16, 32 or 64.
extern "C" void multiply_adds(int bytes, long count) {
  auto* loop = narrow;
#if defined(__x86_64__)
  if (bytes == 32) loop = avx2;
  if (bytes == 64) loop = avx512;
#endif
  loop(count);
}
