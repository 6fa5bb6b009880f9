// What rational_cuda launches, run by a group of host threads, and matrices to try it on.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "rational_plan.h"

namespace host {

const float kNaN = std::numeric_limits<float>::quiet_NaN();

// NaN, aligned to 16 bytes as operator new does, and of exactly its size for AddressSanitizer.
class Floats {
 public:
  explicit Floats(std::size_t count) : memory_(new float[count]) {
    std::fill_n(memory_.get(), count, kNaN);
  }
  float* data() const { return memory_.get(); }

 private:
  std::unique_ptr<float[]> memory_;
};
static_assert(__STDCPP_DEFAULT_NEW_ALIGNMENT__ >= 16);

// The kernels of a launch one after the other, their tasks too, each from poisoned shared memory.
template <typename Method, int kSlots, typename Group>
void run_tasks(const Group& group, const ses::sweep::Launch& launch, float* shared) {
  const auto each = [&](int tasks, int floats, const auto& run) {
    for (int task = 0; task < tasks; ++task) {
      for (int i = group.thread_rank(); i < floats; i += group.num_threads()) shared[i] = kNaN;
      group.sync();
      run(task);
      group.sync();
    }
  };
  for (const bool retry : {false, true})
    each(retry ? launch.retries : launch.sweeps, Method::kSweepFloats, [&](int task) {
      ses::sweep::sweep_task<Method, kSlots>(group, launch.table, retry, task, shared);
    });
  each(launch.closes, ses::sweep::kCloseFloats,
       [&](int task) { ses::sweep::close_task<Method::kTile>(group, launch.table, task, shared); });
  each(launch.center ? launch.closes : 0, ses::sweep::kCloseFloats,
       [&](int task) { ses::sweep::center_task(group, launch.table, task, shared); });
}

// Shared memory of any of its kernels.
inline std::size_t shared_floats(const ses::sweep::Launch& launch) {
  return ses::sweep::with_method(launch.method, [](auto method) {
    return static_cast<std::size_t>(
        std::max(decltype(method)::kSweepFloats, ses::sweep::kCloseFloats));
  });
}

// Every thread of the group calls it.
template <typename Group>
void run_launch(const Group& group, const ses::sweep::Launch& launch, float* shared) {
  ses::sweep::with_method(launch.method, [&](auto method) {
    using Method = decltype(method);
    constexpr int kAll =
        Method::kPacked ? Method::kMaxN / 2 : ses::sweep::tile_count<Method::kTile>(Method::kMaxN);
    const int n = launch.table.layer[0].n;
    const int work = std::max(ses::sweep::tile_count<Method::kTile>(n), (n + 1) / 2);
    if (work <= group.num_threads())
      run_tasks<Method, 1>(group, launch, shared);
    else
      run_tasks<Method, kAll>(group, launch, shared);
  });
}

enum Family { kGaussian, kIndefinite, kRankTwo, kZero, kBad, kFamilies };

// Matrices of one size, one family after the other.
struct Layer {
  int n, batch;
  std::vector<float> gram, h, m;

  Layer(int side, int matrices, unsigned seed, const ses::Poles& poles) : n(side), batch(matrices) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    gram.resize(static_cast<std::size_t>(batch) * n * n);
    h.assign(batch, 7.0f);
    m.assign(gram.size(), 7.0f);
    std::vector<float> x(static_cast<std::size_t>(n) * n);
    for (int b = 0; b < batch; ++b) {
      float* k = &gram[static_cast<std::size_t>(b) * n * n];
      for (float& value : x) value = normal(random);
      const int family = b % kFamilies, rank = family == kRankTwo ? std::min(n, 2) : n;
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j)
          for (int l = 0; l < rank; ++l) k[i * n + j] += x[i * n + l] * x[j * n + l];
      if (family == kZero) std::fill_n(k, n * n, 0.0f);
      if (family == kBad) k[(n - 1) * n + n / 2] = kNaN;
      if (family == kIndefinite) {  // an eigenvalue between -4 t_1 and -16 t_1 of the trace
        const float negative = static_cast<float>(-6 * poles.t[0]);
        for (int i = 0; i < n * n; ++i) k[i] = 0;
        for (int i = 0; i < n; ++i) k[i * n + i] = i == n / 2 && n > 1 ? negative : 1.0f / n;
      }
    }
  }
  // Centred for every other n.
  ses::GramLayer<float, float> view() {
    return {gram.data(), h.data(), m.data(), batch, n, n % 2 == 1};
  }
};

}  // namespace host
