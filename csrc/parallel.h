// A team of threads for one call, and groups of them for one task.
//
// torch's OpenMP threads spin for milliseconds after each of its parallel loops, and threads of our
// own would share their cores with them. Where the process has loaded an OpenMP runtime, the team
// is therefore that runtime's, found by name: nothing is linked, and a process without one, or
// forked since (an OpenMP team does not survive a fork), gets std::thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <system_error>
#include <thread>

#include "group.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#define SES_FIND_OPENMP
#endif

namespace ses {

// The entry point that GCC's `#pragma omp parallel` calls, and how many threads it got; LLVM's and
// Intel's runtimes have them too.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*num_threads)();
};

#if defined(SES_FIND_OPENMP)
inline const pid_t loaded_in = getpid();
#endif

// Null where there is none.
inline const OpenMP* openmp() {
#if defined(SES_FIND_OPENMP)
  static const OpenMP found = {
      reinterpret_cast<decltype(OpenMP::parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
      reinterpret_cast<decltype(OpenMP::num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"))};
  return found.parallel && found.num_threads && getpid() == loaded_in ? &found : nullptr;
#else
  return nullptr;
#endif
}

// Calls body(number of threads) on each of at most `threads` of them, `useful` of which have work.
// OpenMP's are all started nevertheless: it ends those that a team leaves out.
template <typename Body>
void run_team(int threads, long useful, const Body& body) {
  if (threads < 2 || useful < 2) return body(1);
  if (const OpenMP* const found = openmp()) {
    struct Call {
      const Body& body;
      int (*num_threads)();
    } call{body, found->num_threads};
    found->parallel(
        [](void* data) {
          const Call* const in = static_cast<Call*>(data);
          in->body(in->num_threads());
        },
        &call, static_cast<unsigned>(threads), 0);
    return;
  }
  const int wanted = static_cast<int>(std::min<long>(useful, threads)) - 1;
  const std::unique_ptr<std::thread[]> others(new std::thread[static_cast<std::size_t>(wanted)]);
  std::atomic<int> size{0};  // until all have been started
  int started = 0;
  try {
    for (; started < wanted; ++started)
      others[started] = std::thread([&] {
        while (size.load(std::memory_order_acquire) == 0) std::this_thread::yield();
        body(size.load(std::memory_order_relaxed));
      });
  } catch (const std::system_error&) {
    // No more threads to be had: those there are take all the tasks.
  }
  size.store(started + 1, std::memory_order_release);
  body(started + 1);
  for (int i = 0; i < started; ++i) others[i].join();
}

// Calls work(worker, task) for every task in [0, tasks), worker in [0, workers), each worker's
// tasks one after the other; `work` must not throw.
template <typename Work>
void parallel(int workers, long tasks, const Work& work) {
  std::atomic<long> next{0};
  std::atomic<int> arrived{0};
  run_team(workers, tasks, [&](int) {
    const int worker = arrived.fetch_add(1, std::memory_order_relaxed);
    for (long task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      work(worker, task);
  });
}

// Of the threads of a group. A wait is microseconds where each has a processor, and spins; where it
// takes longer it lets others have the processor, which may be those it waits for. With more
// threads than processors every step would wait for one that is not running: once such waits are a
// third of all time, the first thread goes on alone.
class Barrier {
 public:
  // The threads that go on: all, or the first, which gets 1 and the others 0.
  int wait(int rank, int threads) {
    const unsigned turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      const auto lost = Clock::duration(lost_.load(std::memory_order_relaxed)) / (threads - 1);
      alone_ = lost > kNoticed && lost > (Clock::now() - start_) / 3;
      turn_.store(turn + 1, std::memory_order_release);
    } else {
      spin(turn);
    }
    return !alone_ ? threads : rank == 0 ? 1 : 0;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int kSpins = 1000;  // tens of microseconds
  static constexpr std::chrono::milliseconds kNoticed{1};

  void spin(unsigned turn) {
    for (int i = 0; i < kSpins; ++i) {
      if (turn_.load(std::memory_order_acquire) != turn) return;
      pause();
    }
    const Clock::time_point begin = Clock::now();
    while (turn_.load(std::memory_order_acquire) == turn) std::this_thread::yield();
    lost_.fetch_add((Clock::now() - begin).count(), std::memory_order_relaxed);
  }
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const Clock::time_point start_ = Clock::now();
  bool alone_ = false;  // written between the last arrival and the next turn
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> turn_{0};
  std::atomic<Clock::rep> lost_{0};
};

// The largest power of two that is not above x >= 1.
inline int power_of_two_below(int x) {
  int power = 1;
  while (power <= x / 2) power *= 2;
  return power;
}

// Calls work(group, index of the group, task) for every task, on each thread of one of `groups`
// groups of at most `threads`, a power of two.
template <typename Work>
void parallel_groups(int workers, int groups, int threads, long tasks, const Work& work) {
  const std::unique_ptr<Barrier[]> barriers(new Barrier[static_cast<std::size_t>(groups)]);
  std::atomic<int> arrived{0};
  run_team(workers, static_cast<long>(groups) * threads, [&](int team) {
    const int size = std::min(threads, power_of_two_below(team));
    const int count = std::min(groups, team / size);
    const int worker = arrived.fetch_add(1, std::memory_order_relaxed), index = worker / size;
    if (index >= count) return;
    CpuGroup group{worker % size, size,
                   [](void* barrier, int rank, int members) {
                     return static_cast<Barrier*>(barrier)->wait(rank, members);
                   },
                   &barriers[index]};
    for (long task = index; task < tasks; task += count) {
      work(group, index, task);
      if (!group.sync()) return;
    }
  });
}

}  // namespace ses
