// CUDA kernels and their launcher: a matrix a warp up to kMaxNWarp, a matrix a block above. The
// algorithm is in jacobi.h, which the CPU tests run too.
#include <cuda_runtime.h>

#include <atomic>
#include <sstream>

#include "cuda_host.h"
#include "eigh.h"
#include "group.h"
#include "jacobi.h"

namespace ses {
namespace {

// Without opting in to more, a block has this much shared memory on every device.
constexpr std::size_t kDefaultSharedBytes = 48 << 10;

template <typename Scalar>
constexpr int kWarpsPerBlock = 16 / sizeof(Scalar);

static_assert(kWarpsPerBlock<float> * jacobi_shared_bytes(kMaxNWarp, sizeof(float)) <=
                  kDefaultSharedBytes,
              "the warp kernel does not opt in");
static_assert(kWarpsPerBlock<double> * jacobi_shared_bytes(kMaxNWarp, sizeof(double)) <=
                  kDefaultSharedBytes,
              "the warp kernel does not opt in");
static_assert(jacobi_shared_bytes(2, sizeof(float)) % sizeof(double) == 0,
              "slices of the block's shared memory stay aligned");

constexpr int kMaxThreads = 512;

// A round has about n^2 / 2 rotations of V and n^2 / 8 blocks of A to share out.
int block_threads(int n) { return n <= 64 ? kMaxThreads / 2 : kMaxThreads; }

extern __shared__ __align__(16) unsigned char shared_bytes[];

template <typename Scalar>
__global__ void __launch_bounds__(32 * kWarpsPerBlock<Scalar>)
    eigh_warp(const Scalar* a, Scalar* w, Scalar* v, long batch,
              int n) {  // [batch, n, n], [batch, n], as a
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const long matrix = static_cast<long>(blockIdx.x) * kWarpsPerBlock<Scalar> + warp;
  if (matrix >= batch) return;
  const long size = static_cast<long>(n) * n;
  Scalar* shared =
      reinterpret_cast<Scalar*>(shared_bytes + warp * jacobi_shared_bytes(n, sizeof(Scalar)));
  jacobi::eigh(WarpGroup(), a + matrix * size, w + matrix * n, v + matrix * size, n, shared);
}

template <typename Scalar>
__global__ void __launch_bounds__(kMaxThreads)
    eigh_block(const Scalar* a, Scalar* w, Scalar* v, int n) {  // [batch, n, n], [batch, n], as a
  const long matrix = blockIdx.x, size = static_cast<long>(n) * n;
  jacobi::eigh(BlockGroup(), a + matrix * size, w + matrix * n, v + matrix * size, n,
               reinterpret_cast<Scalar*>(shared_bytes));
}

// Also loads both kernels, which a later call under graph capture then need not do.
template <typename Scalar>
int query_max_n(int device) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || device < 0 || device >= count) {
    cudaGetLastError();
    return 0;
  }
  DeviceGuard guard(device);
  cudaFuncAttributes warp{}, block{};
  if (cudaFuncGetAttributes(&warp, eigh_warp<Scalar>) != cudaSuccess ||
      cudaFuncGetAttributes(&block, eigh_block<Scalar>) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "eigh_cuda: cudaDevAttrMaxSharedMemoryPerBlockOptin");
  return max_n_for_shared(static_cast<std::size_t>(bytes) - block.sharedSizeBytes, sizeof(Scalar));
}

template <typename Scalar>
int cached_max_n(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> cache[kDevices];  // max n + 1; 0 is "not asked yet"
  if (device < 0 || device >= kDevices) return query_max_n<Scalar>(device);
  if (cache[device] == 0) cache[device] = query_max_n<Scalar>(device) + 1;
  return cache[device] - 1;
}

}  // namespace

int max_n_cuda(int device, std::size_t itemsize) {
  return itemsize == sizeof(float) ? cached_max_n<float>(device) : cached_max_n<double>(device);
}

template <typename Scalar>
void eigh_cuda(const Scalar* a, Scalar* w, Scalar* v, long batch, int n, int device, void* stream) {
  if (batch == 0) return;
  DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const std::size_t bytes = jacobi_shared_bytes(n, sizeof(Scalar));
  if (n <= kMaxNWarp) {
    constexpr int kWarps = kWarpsPerBlock<Scalar>;
    const auto blocks = static_cast<unsigned>((batch + kWarps - 1) / kWarps);
    eigh_warp<Scalar><<<blocks, 32 * kWarps, kWarps * bytes, on>>>(a, w, v, batch, n);
  } else {
    if (bytes > kDefaultSharedBytes) {
      check(cudaFuncSetAttribute(eigh_block<Scalar>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes)),
            "eigh_cuda: shared memory for this n");
    }
    eigh_block<Scalar><<<static_cast<unsigned>(batch), block_threads(n), bytes, on>>>(a, w, v, n);
  }
  std::ostringstream what;
  what << "eigh_cuda: launch for batch " << batch << ", n " << n << ", itemsize " << sizeof(Scalar)
       << " on device " << device;
  check(cudaPeekAtLastError(), what.str().c_str());
}

template void eigh_cuda(const float*, float*, float*, long, int, int, void*);
template void eigh_cuda(const double*, double*, double*, long, int, int, void*);

}  // namespace ses
