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
