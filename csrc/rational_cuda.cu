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

// A block runs a task, or each of its warps one.
template <bool kByWarp>
constexpr int kGroups = kByWarp ? 4 : 1;

extern __shared__ __align__(16) float shared_floats[];

// Which task is this group's, in which shared memory; calls run(group, task, shared).
template <bool kByWarp, typename Run>
__device__ __forceinline__ void run_task(int tasks, int floats, const Run& run) {
  if constexpr (kByWarp) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int task = static_cast<int>(blockIdx.x) * kGroups<true> + warp;
    if (task < tasks) run(WarpGroup(), task, shared_floats + warp * floats);
  } else {
    run(BlockGroup(), static_cast<int>(blockIdx.x), shared_floats);
  }
}

// One block a multiprocessor is the bound that lets the compiler use all registers.
template <typename Method>
__global__ void __launch_bounds__(kGroups<Method::kByWarp>* Method::kThreads, 1)
    rational_sweep(const __grid_constant__ Table table, int tasks, bool retry) {
  run_task<Method::kByWarp>(tasks, Method::kSweepFloats,
                            [&](const auto& group, int task, float* shared) {
                              sweep::sweep_task<Method, 1>(group, table, retry, task, shared);
                            });
}

template <int kTile, bool kByWarp>
__global__ void __launch_bounds__(kByWarp ? kGroups<true> * 32 : sweep::kCloseThreads)
    rational_close(const __grid_constant__ Table table, int tasks) {
  run_task<kByWarp>(tasks, sweep::kCloseFloats, [&](const auto& group, int task, float* shared) {
    sweep::close_task<kTile>(group, table, task, shared);
  });
}

template <bool kByWarp>
__global__ void __launch_bounds__(kByWarp ? kGroups<true> * 32 : sweep::kCloseThreads)
    rational_center(const __grid_constant__ Table table, int tasks) {
  run_task<kByWarp>(tasks, sweep::kCloseFloats, [&](const auto& group, int task, float* shared) {
    sweep::center_task(group, table, task, shared);
  });
}

// `threads` are those of one task.
template <bool kByWarp, typename... Arguments>
void enqueue(void (*kernel)(Table, int, Arguments...), const Table& table, int tasks, int threads,
             int floats, cudaStream_t stream, Arguments... arguments) {
  constexpr int kTasks = kGroups<kByWarp>;  // of a block
  const auto blocks = static_cast<unsigned>((tasks + kTasks - 1) / kTasks);
  const std::size_t bytes = kTasks * static_cast<std::size_t>(floats) * sizeof(float);
  if (bytes > kDefaultSharedBytes)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)),
          "rational_cuda: shared memory");
  kernel<<<blocks, kTasks * threads, bytes, stream>>>(table, tasks, arguments...);
  check(cudaPeekAtLastError(), "rational_cuda: launch");
}

template <int kTile, bool kByWarp>
void enqueue_closes(const Launch& launch, cudaStream_t stream) {
  const int tasks = launch.closes, threads = launch.close_threads;
  enqueue<kByWarp>(rational_close<kTile, kByWarp>, launch.table, tasks, threads,
                   sweep::kCloseFloats, stream);
  if (launch.center)
    enqueue<kByWarp>(rational_center<kByWarp>, launch.table, tasks, threads, sweep::kCloseFloats,
                     stream);
}

template <typename Method>
void enqueue_all(const Launch& launch, cudaStream_t stream) {
  for (const bool retry : {false, true})
    enqueue<Method::kByWarp>(rational_sweep<Method>, launch.table,
                             retry ? launch.retries : launch.sweeps, launch.sweep_threads,
                             Method::kSweepFloats, stream, retry);
  if constexpr (Method::kByWarp) {
    if (launch.close_threads == 32) return enqueue_closes<Method::kTile, true>(launch, stream);
  }
  enqueue_closes<Method::kTile, false>(launch, stream);
}

// Also loads the kernels, which a later call under graph capture then need not do.
template <typename... Kernel>
bool has_kernels(Kernel*... kernel) {
  cudaFuncAttributes attributes{};
  const bool found = ((cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) && ...);
  if (!found) cudaGetLastError();
  return found;
}

template <typename Method>
bool has_kernels_of() {
  constexpr bool kByWarp = Method::kByWarp;
  return has_kernels(rational_sweep<Method>, rational_close<Method::kTile, false>,
                     rational_close<Method::kTile, kByWarp>, rational_center<false>,
                     rational_center<kByWarp>);
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
    if (!sweep::with_method(i, [](auto method) { return has_kernels_of<decltype(method)>(); }))
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

int max_n_rational_cuda(int device) { return processors_of(device) > 0 ? sweep::Huge::kMaxN : 0; }

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
