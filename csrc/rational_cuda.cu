// CUDA kernels and their launcher: each task of rational_tasks.h is run by a warp or by a block.
#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>

#include "cuda_host.h"
#include "group.h"
#include "rational.h"
#include "rational_plan.h"
#include "rational_tasks.h"

namespace ses {
namespace {

using sweep::Launch;
using sweep::Table;

constexpr std::size_t kDefaultSharedBytes = 48 << 10;

// Groups in a block: several warps, or the block itself.
template <typename Method>
constexpr int kGroups = Method::kThreads == 32 ? 4 : 1;

extern __shared__ __align__(16) float shared_floats[];

// Which task is this group's, in which shared memory; calls run(group, task, shared).
template <typename Method, typename Run>
__device__ __forceinline__ void run_task(int tasks, int floats, const Run& run) {
  if constexpr (kGroups<Method> > 1) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int task = static_cast<int>(blockIdx.x) * kGroups<Method> + warp;
    if (task < tasks) run(WarpGroup(), task, shared_floats + warp * floats);
  } else {
    run(BlockGroup(), static_cast<int>(blockIdx.x), shared_floats);
  }
}

// One block a multiprocessor is the bound that lets the compiler use all registers.
template <typename Method>
__global__ void __launch_bounds__(kGroups<Method>* Method::kThreads, 1)
    rational_sweep(const __grid_constant__ Table table, int tasks, bool retry) {
  run_task<Method>(tasks, Method::kSweepFloats, [&](const auto& group, int task, float* shared) {
    sweep::sweep_task<Method, 1>(group, table, retry, task, shared);
  });
}

template <typename Method>
__global__ void __launch_bounds__(kGroups<Method>* Method::kThreads)
    rational_close(const __grid_constant__ Table table, int tasks) {
  run_task<Method>(tasks, sweep::kCloseFloats, [&](const auto& group, int task, float* shared) {
    sweep::close_task<Method>(group, table, task, shared);
  });
}

template <typename Method>
__global__ void __launch_bounds__(kGroups<Method>* Method::kThreads)
    rational_center(const __grid_constant__ Table table, int tasks) {
  run_task<Method>(tasks, sweep::kCloseFloats, [&](const auto& group, int task, float* shared) {
    sweep::center_task(group, table, task, shared);
  });
}

template <typename Method, typename... Arguments>
void enqueue(void (*kernel)(Table, int, Arguments...), const Launch& launch, int tasks, int floats,
             cudaStream_t stream, Arguments... arguments) {
  const auto blocks = static_cast<unsigned>((tasks + kGroups<Method> - 1) / kGroups<Method>);
  const std::size_t bytes = kGroups<Method> * static_cast<std::size_t>(floats) * sizeof(float);
  if (bytes > kDefaultSharedBytes)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)),
          "rational_cuda: shared memory");
  kernel<<<blocks, kGroups<Method> * launch.group_threads, bytes, stream>>>(launch.table, tasks,
                                                                            arguments...);
  check(cudaPeekAtLastError(), "rational_cuda: launch");
}

template <typename Method>
void enqueue_all(const Launch& launch, cudaStream_t stream) {
  constexpr int kSweep = Method::kSweepFloats, kClose = sweep::kCloseFloats;
  enqueue<Method>(rational_sweep<Method>, launch, launch.sweeps, kSweep, stream, false);
  enqueue<Method>(rational_sweep<Method>, launch, launch.retries, kSweep, stream, true);
  enqueue<Method>(rational_close<Method>, launch, launch.closes, kClose, stream);
  if (launch.center)
    enqueue<Method>(rational_center<Method>, launch, launch.closes, kClose, stream);
}

// Also loads the kernels, which a later call under graph capture then need not do.
template <typename Method>
bool has_kernels() {
  cudaFuncAttributes attributes{};
  const bool found = cudaFuncGetAttributes(&attributes, rational_sweep<Method>) == cudaSuccess &&
                     cudaFuncGetAttributes(&attributes, rational_close<Method>) == cudaSuccess &&
                     cudaFuncGetAttributes(&attributes, rational_center<Method>) == cudaSuccess;
  if (!found) cudaGetLastError();
  return found;
}

// 0 where the kernels cannot run.
int query_processors(int device) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || device < 0 || device >= count) {
    cudaGetLastError();
    return 0;
  }
  DeviceGuard guard(device);
  for (int i = 0; i < sweep::kMethods; ++i)
    if (!sweep::with_method(i, [](auto method) { return has_kernels<decltype(method)>(); }))
      return 0;
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "cudaDevAttrMultiProcessorCount");
  return processors;
}

int processors_of(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> cache[kDevices];  // processors + 1; 0 is "not asked yet"
  if (device < 0 || device >= kDevices) return query_processors(device);
  if (cache[device] == 0) cache[device] = query_processors(device) + 1;
  return cache[device] - 1;
}

}  // namespace

int max_n_rational_cuda(int device) { return processors_of(device) > 0 ? sweep::Huge::kSide : 0; }

std::size_t rational_cuda_workspace(const GramLayer<float, float>* layers, int count,
                                    const Poles& poles, int device) {
  std::size_t floats = 0;
  sweep::plan(layers, count, poles, nullptr, processors_of(device), &floats);
  return floats;
}

void rational_cuda(const GramLayer<float, float>* layers, int count, const Poles& poles,
                   float* workspace, int device, void* stream) {
  const int processors = processors_of(device);
  if (processors == 0) throw std::runtime_error("rational_cuda: no kernel for this device");
  std::size_t floats = 0;
  const auto launches = sweep::plan(layers, count, poles, workspace, processors, &floats);
  DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  for (const Launch& launch : launches) {
    sweep::with_method(launch.method,
                       [&](auto method) { enqueue_all<decltype(method)>(launch, on); });
  }
}

}  // namespace ses
