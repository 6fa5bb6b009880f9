// What rational_cuda launches: which layers together, with how many threads, and which part of the
// workspace is whose. Host code without CUDA, so that the tests run the same plan.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "rational.h"
#include "rational_tasks.h"

namespace ses {
namespace sweep {

// The 28 tiles of n = 35 and of n = 70 are a warp's, the 253 tiles of n = 256 a block's; above,
// tiles stay in memory.
using Small = Method<5, false, 32, 32>;
using Medium = Method<10, false, 64, 32>;
using Large = Method<12, false, 256, 256>;
using Huge = Method<12, true, 512, 256>;
constexpr int kMethods = 4;

// Threads that a multiprocessor runs at 180 to 250 registers each, and at 64, to count waves of
// tasks.
constexpr int kResidentThreads = 256;
constexpr int kResidentCloseThreads = 1024;

// Calls use(Method()) with the method of that number, the smallest first.
template <typename Use>
auto with_method(int method, const Use& use) {
  return method == 0   ? use(Small())
         : method == 1 ? use(Medium())
         : method == 2 ? use(Large())
                       : use(Huge());
}

inline int max_n_of(int method) {
  return with_method(method, [](auto chosen) { return chosen.kMaxN; });
}

inline int method_for(int n) {
  int method = 0;
  while (max_n_of(method) < n) ++method;
  return method;
}

struct Launch {
  int method;
  int sweep_threads, close_threads;  // of one task
  int sweeps, retries, closes;       // tasks
  bool center;                       // as many tasks as to close
  Table table;
};

constexpr double kLargePole = 0.05;  // P + t_j I is then nearer to t_j I than to P

// Cuts one allocation into pieces of whole 16 bytes; counts alone where there is none yet.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* take(long floats) {
    float* piece = base_ == nullptr ? nullptr : base_ + size_;
    size_ += (static_cast<std::size_t>(floats) + 3) / 4 * 4;
    return piece;
  }
  std::size_t size() const { return size_; }

 private:
  float* base_;
  std::size_t size_ = 0;
};

// Layers of one kernel, the largest matrices first: the last tasks to start are the short ones.
inline Launch make_launch(const std::vector<GramLayer<float, float>>& layers, int method,
                          const Poles& poles, int processors, Arena& arena) {
  Launch launch{};
  launch.method = method;
  launch.sweep_threads = with_method(method, [&](auto chosen) {
    return chosen.kPacked ? chosen.kThreads
                          : (tile_count<chosen.kTile>(layers[0].n) + 31) / 32 * 32;
  });

  Table& table = launch.table;
  table.layers = static_cast<int>(layers.size());
  table.poles = poles.count;
  double constant = poles.constant;
  for (int j = 0; j < poles.count; ++j) {
    table.t[j] = static_cast<float>(poles.t[j]);
    table.w[j] = static_cast<float>(poles.w[j]);
    if (poles.t[j] < kLargePole)
      table.first_large = j + 1;
    else
      constant -= poles.w[j] / poles.t[j];
  }
  table.constant = static_cast<float>(constant);
  long matrices = 0;
  for (const auto& layer : layers) matrices += layer.batch;
  // A task for each pole, or fewer where two waves of tasks fill the device already: partial sums
  // then take less memory.
  const long enough = 2L * processors * (kResidentThreads / launch.sweep_threads);
  table.splits = 1;
  while (table.splits < poles.count &&
         (poles.count % table.splits != 0 || matrices * table.splits < enough))
    ++table.splits;

  long sweeps = 0, closes = 0;
  for (int i = 0; i < table.layers; ++i) {
    const auto& from = layers[i];
    Layer& to = table.layer[i];
    const long tasks = from.batch * table.splits;
    const long size =
        with_method(method, [&](auto chosen) { return tasks * packed_size<chosen.kTile>(from.n); });
    to.gram = from.gram;
    to.h = from.h;
    to.m = from.m;
    to.batch = static_cast<int>(from.batch);
    to.n = from.n;
    to.slices = from.m == nullptr ? nullptr : arena.take(size);
    to.working = with_method(method, [](auto chosen) { return chosen.kPacked; }) ? arena.take(size)
                                                                                 : nullptr;
    to.partials = arena.take(tasks);
    to.scales = arena.take(from.batch);
    const long blocks = blocks_a_side(from.n);
    if (from.m != nullptr && from.center) {
      to.sums = arena.take(from.batch * blocks * from.n);
      launch.center = true;
    }
    to.chunks =
        static_cast<int>(from.m == nullptr ? 1
                                           : std::min(blocks * (blocks + 1) / 2,
                                                      std::max(1L, 2L * processors / matrices)));
    sweeps += tasks;
    closes += from.batch * to.chunks;
  }
  if (std::max(sweeps, closes) > INT_MAX)
    throw std::invalid_argument("rational_cuda: too many matrices for one grid");
  launch.sweeps = static_cast<int>(sweeps);
  launch.retries = static_cast<int>(matrices);
  launch.closes = static_cast<int>(closes);
  // A warp alone waits for the L2 cache at every entry, and the warps of a block hide that. Beyond
  // two waves of blocks other tasks do, and a small matrix has no work for so many lanes.
  const long few = 2L * processors * (kResidentCloseThreads / kCloseThreads);
  const bool by_warp = with_method(method, [](auto chosen) { return chosen.kByWarp; });
  launch.close_threads = by_warp && closes > few ? 32 : kCloseThreads;
  return launch;
}

// The launches for a device of so many multiprocessors; *floats is the size of the workspace.
inline std::vector<Launch> plan(const GramLayer<float, float>* layers, int count,
                                const Poles& poles, float* workspace, int processors,
                                std::size_t* floats) {
  if (poles.count < 1 || poles.count > kMaxPoles)
    throw std::invalid_argument("rational_cuda: the number of poles must be in [1, " +
                                std::to_string(kMaxPoles) + "], got " +
                                std::to_string(poles.count));
  int largest = 0;
  for (int i = 0; i < count; ++i) {
    if (layers[i].n < 1 || layers[i].n > Huge::kMaxN || layers[i].batch < 0)
      throw std::invalid_argument("rational_cuda: n must be in [1, " + std::to_string(Huge::kMaxN) +
                                  "] and batch not negative, got " + std::to_string(layers[i].n) +
                                  " and " + std::to_string(layers[i].batch));
    if (layers[i].batch > 0) largest = std::max(largest, layers[i].n);
  }
  Arena rest(workspace);
  std::vector<Launch> launches;
  for (int method = kMethods - 1; method >= 0; --method) {
    std::vector<GramLayer<float, float>> members;
    for (int i = 0; i < count; ++i) {
      // Few matrices join the launch of the largest, on processors that would be idle; for many
      // the kernel for their own size is worth a launch.
      const bool many = layers[i].batch > 2L * processors / poles.count;
      if (layers[i].batch > 0 && method_for(many ? layers[i].n : largest) == method)
        members.push_back(layers[i]);
    }
    std::stable_sort(members.begin(), members.end(),
                     [](const auto& a, const auto& b) { return a.n > b.n; });
    for (std::size_t i = 0; i < members.size(); i += kMaxLayers) {
      const auto end = members.begin() + std::min(i + kMaxLayers, members.size());
      launches.push_back(make_launch({members.begin() + i, end}, method, poles, processors, rest));
    }
  }
  *floats = rest.size();
  return launches;
}

}  // namespace sweep
}  // namespace ses
