// The rational entropy of CUDA on the host, launch plan and tasks alike. As a program: the same
// bits on any number of threads, and under ThreadSanitizer no access that a barrier fails to order.
// As a library: the digits of the GPU for python_tests/test_sweep.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "host_group.h"
#include "host_rational.h"

namespace {

using namespace host;
using ses::GramLayer;
using ses::Poles;
using ses::sweep::Launch;

void run(const Launch& launch, int threads) {
  const Floats memory(shared_floats(launch));
  run_team(threads, [&](const HostGroup& group) { run_launch(group, launch, memory.data()); });
}

// What rational_cuda does on a device of so many multiprocessors; a method of 0 or more is used for
// all layers instead of the planned one. Returns the floats of the workspace.
std::size_t rational(const std::vector<GramLayer<float, float>>& layers, const Poles& poles,
                     int processors, int method, int threads) {
  const auto launches_in = [&](float* workspace, std::size_t* floats) {
    const int count = static_cast<int>(layers.size());
    if (method < 0)
      return ses::sweep::plan(layers.data(), count, poles, workspace, processors, floats);
    ses::sweep::Arena rest(workspace);
    std::vector<Launch> one{ses::sweep::make_launch(layers, method, poles, processors, rest)};
    *floats = rest.size();
    return one;
  };
  std::size_t floats = 0;
  launches_in(nullptr, &floats);
  const Floats workspace(floats);
  for (const Launch& launch : launches_in(workspace.data(), &floats)) run(launch, threads);
  return floats;
}

}  // namespace

// Returns the floats of workspace, or -1 where the plan refuses.
extern "C" long rational_host(const float* gram, float* h, float* m, long batch, int n, double c,
                              int count, const double* t, const double* w, bool center,
                              int processors, int method) {
  try {
    return static_cast<long>(
        rational({{gram, h, m, batch, n, center}}, {c, count, t, w}, processors, method, 1));
  } catch (const std::exception&) {
    return -1;
  }
}

namespace {

// Three poles: enough for splits of several and of one.
const double kT[] = {1e-5, 1e-2, 1.0}, kW[] = {2e-5, 1e-2, 2.0};
const Poles kPoles{1.5, 3, kT, kW};

void fail(const char* what, int n, int method, int threads) {
  std::printf("FAILED: %s (n %d, method %d, threads %d)\n", what, n, method, threads);
  std::exit(1);
}

bool same(const std::vector<float>& x, const std::vector<float>& y) {
  return std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
}

Layer make_layer(int n, int batch) { return Layer(n, batch, 31u * n, kPoles); }

Layer solve(int n, int batch, int processors, int method, int threads) {
  Layer layer = make_layer(n, batch);
  rational({layer.view()}, kPoles, processors, method, threads);
  return layer;
}

void check_values(const Layer& layer, int method) {
  for (int b = 0; b < layer.batch; ++b) {
    const int family = b % kFamilies;
    const float expected = family == kZero ? 0.0f : kNaN;
    const std::size_t square = static_cast<std::size_t>(layer.n) * layer.n;
    for (std::size_t i = 0; i <= square; ++i) {
      const float x = i == square ? layer.h[b] : layer.m[b * square + i];
      const bool right = family <= kRankTwo ? std::isfinite(x)
                         : family == kZero  ? x == expected
                                            : std::isnan(x);
      if (!right) fail("value of a special matrix", layer.n, method, b);
    }
  }
}

void threads_agree(int n, int method, int batch) {
  for (const int processors : {1, 64}) {  // all poles in one task, a task a pole
    const Layer one = solve(n, batch, processors, method, 1);
    check_values(one, method);
    for (const int threads : {7, 32, 128}) {
      // A few cores take turns at every barrier: large teams get small matrices.
      if (threads * n > 420) continue;
      const Layer team = solve(n, batch, processors, method, threads);
      if (!same(one.h, team.h) || !same(one.m, team.m))
        fail("threads change the bits", n, method, threads);
    }
  }
}

// Registers and memory give the same digits.
void methods_agree(int n) {
  const Layer large = solve(n, kFamilies, 64, 2, 1), huge = solve(n, kFamilies, 64, 3, 1);
  check_values(huge, 3);
  if (!same(large.h, huge.h) || !same(large.m, huge.m)) fail("methods differ", n, 3, 0);
}

// Layers in one plan have the bits they have alone, as long as the poles are split the same way.
void layers_agree() {
  std::vector<Layer> layers;
  for (const int n : {64, 3, 130, 1, 70}) layers.push_back(make_layer(n, 2));
  std::vector<GramLayer<float, float>> views;
  for (Layer& layer : layers) views.push_back(layer.view());
  rational(views, kPoles, 64, -1, 1);
  for (const Layer& layer : layers) {
    const Layer alone = solve(layer.n, 2, 64, 2, 1);
    if (!same(layer.h, alone.h) || !same(layer.m, alone.m))
      fail("layers change the bits", layer.n, 2, 0);
  }
  // Many layers take several launches; many small matrices take their own.
  std::vector<Layer> more;
  for (int i = 0; i < ses::sweep::kMaxLayers + 3; ++i) more.push_back(make_layer(5, 1));
  more.push_back(make_layer(5, 300));
  more.push_back(make_layer(66, 1));
  views.clear();
  for (Layer& layer : more) views.push_back(layer.view());
  rational(views, kPoles, 64, -1, 1);
  const Layer small = solve(5, 300, 64, 0, 1), large = solve(5, 1, 64, 2, 1);
  if (!same(more[ses::sweep::kMaxLayers + 3].m, small.m)) fail("many small matrices", 5, 0, 0);
  for (int i = 0; i < ses::sweep::kMaxLayers + 3; ++i)
    if (!same(more[i].m, large.m)) fail("many layers", 5, 2, 0);
}

// A block closes a matrix, unless it is a small one of so many that warps fill the device.
void closes_are_planned() {
  const auto threads_to_close = [](int n, long batch) {
    float x = 0;
    const GramLayer<float, float> layer{&x, &x, &x, batch, n};
    std::size_t floats = 0;
    const auto launches = ses::sweep::plan(&layer, 1, kPoles, nullptr, 64, &floats);
    if (launches.size() != 1) fail("one layer takes one launch", n, -1, 0);
    return launches[0].close_threads;
  };
  for (const int n : {1, 32, 33, 64, 65, 256, 512}) {
    if (threads_to_close(n, 1) != ses::sweep::kCloseThreads) fail("one matrix", n, -1, 0);
    if (threads_to_close(n, 10000) != (n <= 64 ? 32 : ses::sweep::kCloseThreads))
      fail("many matrices", n, -1, 0);
  }
}

}  // namespace

int main() {
  for (int method = 0; method < ses::sweep::kMethods; ++method)
    for (const int n : {1, 2, 5, 13, 25, 50})
      if (n <= ses::sweep::max_n_of(method)) threads_agree(n, method, n < 10 ? kFamilies : 2);
  for (const int n : {1, 12, 13, 24, 25, 60}) methods_agree(n);
  layers_agree();
  closes_are_planned();
  std::puts("ok");
}
