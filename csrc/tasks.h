// How a CPU call is cut into tasks, and for how many threads.
#pragma once

#include <algorithm>

#include "measured.h"
#include "parallel.h"

namespace ses {

inline int workers_for(double nanoseconds, int threads) {
  return nanoseconds < 2 * kTeamNanoseconds ? 1 : threads;
}

// Tasks of a batch: several matrices each where they are small, parts of one where they are few.
struct Shares {
  int workers;
  long parts, matrices, tasks;

  Shares(long batch, double nanoseconds, long most_parts, int threads)
      : workers(workers_for(static_cast<double>(batch) * nanoseconds, threads)),
        parts(batch < 4L * workers && batch % workers != 0 ? std::min<long>(most_parts, workers)
                                                           : 1),
        matrices(parts > 1 ? 1 : std::max(1L, static_cast<long>(kTeamNanoseconds / nanoseconds))),
        tasks((batch + matrices - 1) / matrices * parts) {}

  // f(matrix, part) for all of a task
  template <typename Function>
  void each(long task, long batch, Function f) const {
    const long first = task / parts * matrices;
    for (long i = first; i < std::min(batch, first + matrices); ++i)
      f(i, static_cast<int>(task % parts));
  }
};

}  // namespace ses
