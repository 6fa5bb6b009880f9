// A team of threads for one call.
//
// torch's OpenMP threads spin for milliseconds after each of its parallel loops, and threads of our
// own would share their cores with them. Where the process has loaded an OpenMP runtime, the team
// is therefore that runtime's, found by name: nothing is linked, and a process without one, or
// forked since (an OpenMP team does not survive a fork), gets std::thread.
#pragma once

#include <atomic>
#include <memory>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#define SES_FIND_OPENMP
#endif

namespace ses {

// The entry point that GCC's `#pragma omp parallel` calls; LLVM's and Intel's runtimes have it too.
using OpenMPParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

#if defined(SES_FIND_OPENMP)
inline const pid_t loaded_in = getpid();
#endif

inline OpenMPParallel openmp_parallel() {
#if defined(SES_FIND_OPENMP)
  static const auto found = reinterpret_cast<OpenMPParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == loaded_in ? found : nullptr;
#else
  return nullptr;
#endif
}

// Calls work(worker, task) for every task in [0, tasks), worker in [0, workers), each worker's
// tasks one after the other; `work` must not throw.
template <typename Work>
void parallel(int workers, long tasks, const Work& work) {
  struct Team {
    const Work& work;
    long tasks;
    std::atomic<long> next{0};
    std::atomic<int> arrived{0};
    void run() {
      const int worker = arrived.fetch_add(1, std::memory_order_relaxed);
      for (long task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
        work(worker, task);
    }
  } team{work, tasks};
  if (workers < 2 || tasks < 2) {
    team.run();
    return;
  }
  if (const OpenMPParallel start = openmp_parallel()) {
    start([](void* data) { static_cast<Team*>(data)->run(); }, &team,
          static_cast<unsigned>(workers), 0);
    return;
  }
  const int others = static_cast<int>(tasks < workers ? tasks : workers) - 1;
  const std::unique_ptr<std::thread[]> threads(new std::thread[static_cast<std::size_t>(others)]);
  int started = 0;
  try {
    for (; started < others; ++started) threads[started] = std::thread([&team] { team.run(); });
  } catch (const std::system_error&) {
    // No more threads to be had: those there are take all the tasks.
  }
  team.run();
  for (int i = 0; i < started; ++i) threads[i].join();
}

}  // namespace ses
