// What the extension computes, seen from every side: included by the bindings, the CPU and the CUDA
// sources. Plain pointers and sizes; no Python, no torch, no CUDA header.
#pragma once

#include <cstddef>

#include "measured.h"

#if defined(__CUDACC__)
#define SES_HOST_DEVICE __host__ __device__
#else
#define SES_HOST_DEVICE
#endif

namespace ses {

// ---- limits; Python reads them through max_n_cpu() and max_n_cuda(); kMaxNCpu is measured ----

// One warp a matrix up to here, one thread block a matrix above.
constexpr int kMaxNWarp = 32;

// Players of the Jacobi tournament: n, made even.
SES_HOST_DEVICE constexpr int jacobi_players(int n) { return n + n % 2; }

// Shared memory of one matrix: A and V with a virtual player where n is odd, and one scratch row.
SES_HOST_DEVICE constexpr std::size_t jacobi_shared_bytes(int n, std::size_t itemsize) {
  return (2 * static_cast<std::size_t>(jacobi_players(n)) + 1) * jacobi_players(n) * itemsize;
}

// The largest n whose matrix fits a thread block's shared memory.
constexpr int max_n_for_shared(std::size_t bytes, std::size_t itemsize) {
  int n = 0;
  while (jacobi_shared_bytes(n + 1, itemsize) <= bytes) ++n;
  return n;
}
static_assert(max_n_for_shared(64 << 10, 4) == 90, "T4: 64 KB");
static_assert(max_n_for_shared(99 << 10, 4) == 112, "Ada: 99 KB");
static_assert(max_n_for_shared(163 << 10, 4) == 144, "A100: 163 KB");
static_assert(max_n_for_shared(227 << 10, 4) == 170, "H100: 227 KB");

// ---- the solvers ----
// A = V diag(w) V^T for each matrix of a batch: w ascending, and v is V in LAPACK's column-major
// order, one eigenvector after the other. Only the lower triangle of a is read. A matrix with a NaN
// or Inf there gets NaN, and no other does. a [batch, n, n], w [batch, n], v [batch, n, n];
// contiguous, and v must not overlap a.

// Scalar is float or double. `threads` is an upper bound: small batches start no thread.
template <typename Scalar>
void eigh_cpu(const Scalar* a, Scalar* w, Scalar* v, long batch, int n, int threads);

// Enqueues on the stream (a cudaStream_t) of the device and returns: no allocation, no
// synchronisation. Throws std::runtime_error when the launch fails or there is no CUDA build.
template <typename Scalar>
void eigh_cuda(const Scalar* a, Scalar* w, Scalar* v, long batch, int n, int device, void* stream);

// 0 where the CUDA kernels cannot run: no CUDA build, no device, a driver too old, no code for it.
int max_n_cuda(int device, std::size_t itemsize);

}  // namespace ses
