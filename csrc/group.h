// Groups of threads that run one algorithm together, with the names of CUDA's cooperative groups.
// any() is a barrier as well as a vote.
#pragma once

#include "eigh.h"

namespace ses {

// The calling thread alone: the reference every other group has to match bit for bit.
struct ThreadGroup {
  SES_HOST_DEVICE int thread_rank() const { return 0; }
  SES_HOST_DEVICE int num_threads() const { return 1; }
  SES_HOST_DEVICE void sync() const {}
  SES_HOST_DEVICE bool any(bool vote) const { return vote; }
};

// Threads of a CPU call that solve one matrix together; alone by default. A barrier may find that
// the processors are busy with others, and leave all to the first thread: what is computed must not
// depend on the number of threads. Always inlined, and the barrier by its address: kernels of every
// instruction set share nothing that they could leave to the linker.
struct CpuGroup {
  int rank = 0, threads = 1;
  int (*wait)(void* barrier, int rank, int threads) = nullptr;  // the threads that go on
  void* barrier = nullptr;

  __attribute__((always_inline)) int thread_rank() const { return rank; }
  __attribute__((always_inline)) int num_threads() const { return threads; }
  // False for a thread that is to return.
  __attribute__((always_inline)) bool sync() {
    if (threads > 1) threads = wait(barrier, rank, threads);
    return threads > 0;
  }
};

#if defined(__CUDACC__)

struct WarpGroup {
  __device__ int thread_rank() const { return static_cast<int>(threadIdx.x % 32); }
  __device__ int num_threads() const { return 32; }
  __device__ void sync() const { __syncwarp(); }
  __device__ bool any(bool vote) const {
    // The vote alone orders no memory.
    __syncwarp();
    return __any_sync(0xffffffffu, vote) != 0;
  }
};

struct BlockGroup {
  __device__ int thread_rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int num_threads() const { return static_cast<int>(blockDim.x); }
  __device__ void sync() const { __syncthreads(); }
  __device__ bool any(bool vote) const { return __syncthreads_or(vote) != 0; }
};

#endif

}  // namespace ses
