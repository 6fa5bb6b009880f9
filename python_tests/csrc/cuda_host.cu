// rational_cuda and eigh_cuda without Python and without torch: the project's own entry points on
// device memory, against the same algorithms run by one host thread, digit for digit, and against
// float64.
//
//   cuda_host check c t_1 .. t_k w_1 .. w_k     compares, and prints the errors
//   cuda_host launch c t_1 .. t_k w_1 .. w_k    only makes the calls, for a sanitizer to watch
//
// The exit code is 1 where something differs, and 77 without a device. Written without a GPU at
// hand: what it says of one has not been seen yet.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda_host.h"
#include "eigh.h"
#include "families.h"
#include "group.h"
#include "host_rational.h"
#include "jacobi.h"
#include "rational.h"

namespace {

using host::Layer;
using ses::check;

constexpr int kDevice = 0;
constexpr int kMaxNDefinition = 300;  // above, one host thread takes too long for float64
int failures = 0;

void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

// One allocation each, so that memcheck sees where it ends; `offset` numbers into it.
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(std::size_t count, std::size_t offset = 0) : offset_(offset), count_(count) {
    check(cudaMalloc(&memory_, (offset + count) * sizeof(T)), "cudaMalloc");
  }
  OnDevice(const std::vector<T>& from, std::size_t offset) : OnDevice(from.size(), offset) {
    check(cudaMemcpy(data(), from.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  ~OnDevice() { cudaFree(memory_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  T* data() const { return memory_ + offset_; }
  std::vector<T> values() const {
    std::vector<T> to(count_);
    check(cudaMemcpy(to.data(), data(), count_ * sizeof(T), cudaMemcpyDeviceToHost), "copy");
    return to;
  }

 private:
  T* memory_ = nullptr;
  std::size_t offset_, count_;
};

// Numbers that differ; a NaN is one number, whatever its bits.
template <typename T>
long differing(const std::vector<T>& x, const std::vector<T>& y) {
  long count = 0;
  for (std::size_t i = 0; i < x.size(); ++i)
    count += std::memcmp(&x[i], &y[i], sizeof(T)) != 0 && !(std::isnan(x[i]) && std::isnan(y[i]));
  return count;
}

// ---- 1 / d, the one operation that need not round as on the host ----

__global__ void count_other_reciprocals(unsigned* count) {
  const unsigned mantissa = blockIdx.x * blockDim.x + threadIdx.x;
  const float d = __uint_as_float(0x3f800000u | mantissa);
  if (ses::sweep::inverse_of(d) != __frcp_rn(d)) atomicAdd(count, 1u);
}

// Of all mantissas, those of another reciprocal: powers of two scale it exactly.
unsigned other_reciprocals() {
  const OnDevice<unsigned> count(std::vector<unsigned>{0}, 0);
  count_other_reciprocals<<<(1 << 23) / 256, 256>>>(count.data());
  check(cudaGetLastError(), "count_other_reciprocals");
  return count.values()[0];
}

// ---- the rational solver ----

struct Errors {
  double h = 0, gradient = 0;  // |H - H_64| and |(M - M_64) K|, neither depends on the scale of K
};

// H and M of the definition in float64, of a matrix without negative eigenvalues.
struct Definition {
  int n;
  double h = 0;
  std::vector<double> k, m;  // [n, n]

  Definition(const float* gram, int side) : n(side), k(gram, gram + side * side), m(k.size()) {
    std::vector<double> w(n), v(k.size());
    std::vector<double> shared(ses::jacobi_shared_bytes(n, sizeof(double)) / sizeof(double));
    ses::jacobi::eigh(ses::ThreadGroup(), k.data(), w.data(), v.data(), n, shared.data());
    double trace = 0;
    for (int i = 0; i < n; ++i) trace += k[i * n + i];
    std::vector<double> log(n);
    for (int i = 0; i < n; ++i) {
      const double p = w[i] / trace;
      log[i] = p > 1e-7 ? std::log(p) : 0;
      h -= p * log[i];
    }
    for (int l = 0; l < n; ++l)
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j)
          m[i * n + j] -= v[l * n + i] * (log[l] + h) / trace * v[l * n + j];
  }

  Errors errors(float other_h, const float* other_m) const {  // [n, n]; null: of H alone
    double sum = 0;
    std::vector<double> row(n);
    for (int i = 0; other_m != nullptr && i < n; ++i) {
      std::fill(row.begin(), row.end(), 0.0);
      for (int l = 0; l < n; ++l)
        for (int j = 0; j < n; ++j) row[j] += (other_m[i * n + l] - m[i * n + l]) * k[l * n + j];
      for (const double x : row) sum += x * x;
    }
    return {std::fabs(other_h - h), std::sqrt(sum)};
  }
};

class Rational {
 public:
  Rational(const ses::Poles& poles, bool compare) : poles_(poles), compare_(compare) {
    check(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, kDevice),
          "cudaDevAttrMultiProcessorCount");
    if (compare) reciprocals_ = other_reciprocals();
    if (compare) std::printf("1 / d differs for %u of 2^23 mantissas\n", reciprocals_);
  }

  Layer layer(int n, int batch) const { return Layer(n, batch, 31u * n, poles_); }

  // Matrices that fill the device, whichever wave of whichever kernel counts them.
  int more_than_few() const { return 8 * processors_ + 3; }

  // One call for all of these; `offset` floats from where an allocation begins.
  void call(const char* name, std::vector<Layer> layers, int offset = 0, bool gradient = true) {
    std::vector<ses::GramLayer<float, float>> views, device_views;
    std::vector<std::unique_ptr<OnDevice<float>>> grams, hs, ms;
    for (Layer& one : layers) {
      grams.push_back(std::make_unique<OnDevice<float>>(one.gram, offset));
      hs.push_back(std::make_unique<OnDevice<float>>(one.h.size(), offset));
      ms.push_back(std::make_unique<OnDevice<float>>(one.m.size(), offset));
      views.push_back(one.view());
      if (!gradient) views.back().m = nullptr;
      device_views.push_back(views.back());
      device_views.back().gram = grams.back()->data();
      device_views.back().h = hs.back()->data();
      if (gradient) device_views.back().m = ms.back()->data();
    }
    const int count = static_cast<int>(layers.size());
    const OnDevice<float> workspace(
        ses::rational_cuda_workspace(device_views.data(), count, poles_, kDevice));
    ses::rational_cuda(device_views.data(), count, poles_, workspace.data(), kDevice, nullptr);
    check(cudaDeviceSynchronize(), name);
    if (!compare_) return;

    solve_on_host(views);
    Difference all;
    for (int i = 0; i < count; ++i)
      compare(name, layers[i], views[i], hs[i]->values(), gradient ? ms[i]->values() : layers[i].m,
              all);
    std::printf("%s, n %d", name, layers[0].n);
    if (count > 1) std::printf(" and %d more layers", count - 1);
    std::printf(": %ld numbers differ", all.numbers);
    if (all.has_h) std::printf("; error of H %.1e", all.worst.h);
    if (all.has_m) std::printf(", of M K %.1e", all.worst.gradient);
    std::puts("");
    // Where every 1 / d is that of the host, so is every number.
    if (all.numbers > 0 && reciprocals_ == 0) fail("other digits than on the host");
  }

 private:
  struct Difference {
    long numbers = 0;  // that are not the host's
    Errors worst;
    bool has_h = false, has_m = false;
  };

  void solve_on_host(const std::vector<ses::GramLayer<float, float>>& views) const {
    const int count = static_cast<int>(views.size());
    std::size_t floats = 0;
    ses::sweep::plan(views.data(), count, poles_, nullptr, processors_, &floats);
    const host::Floats workspace(floats);
    for (const auto& launch :
         ses::sweep::plan(views.data(), count, poles_, workspace.data(), processors_, &floats)) {
      const host::Floats shared(host::shared_floats(launch));
      host::run_launch(ses::ThreadGroup(), launch, shared.data());
    }
  }

  void compare(const char* name, const Layer& on_host, const ses::GramLayer<float, float>& view,
               const std::vector<float>& h, const std::vector<float>& m, Difference& all) const {
    all.numbers += differing(on_host.h, h) + differing(on_host.m, m);
    const int n = view.n;
    const bool has_m = view.m != nullptr && !view.center;
    for (int b = 0; n <= kMaxNDefinition && b < std::min<long>(view.batch, host::kFamilies); ++b) {
      if (b % host::kFamilies != host::kGaussian && b % host::kFamilies != host::kRankTwo) continue;
      const std::size_t at = static_cast<std::size_t>(b) * n * n;
      const Definition definition(view.gram + at, n);
      const Errors ours = definition.errors(h[b], has_m ? &m[at] : nullptr);
      const Errors hosts = definition.errors(on_host.h[b], has_m ? &on_host.m[at] : nullptr);
      if (!(ours.h <= 2 * hosts.h + 1e-6 && ours.gradient <= 2 * hosts.gradient + 1e-6))
        fail(std::string(name) + ": not as good as on the host, n " + std::to_string(n));
      all.worst = {std::max(all.worst.h, ours.h), std::max(all.worst.gradient, ours.gradient)};
      all.has_h = true;
      all.has_m = all.has_m || has_m;
    }
  }

  ses::Poles poles_;
  bool compare_;
  int processors_ = 0;
  unsigned reciprocals_ = 0;
};

void call_rational(const ses::Poles& poles, bool compare) {
  Rational rational(poles, compare);
  for (const int n : {1,  2,  3,  5,   8,   12,  16,  17,  31,  32,  33,  47, 64,
                      65, 70, 72, 100, 128, 129, 130, 256, 257, 258, 300, 512})
    rational.call("alone", {rational.layer(n, n <= 130 ? host::kFamilies : 1)});
  for (const int n : {20, 36, 64, 120, 300}) rational.call("misaligned", {rational.layer(n, 2)}, 1);
  for (const int n : {7, 40, 100, 257}) rational.call("H alone", {rational.layer(n, 1)}, 0, false);
  std::vector<Layer> mixed;
  for (const int n : {64, 3, 130, 1, 70, 260}) mixed.push_back(rational.layer(n, 2));
  rational.call("mixed", mixed);
  // More layers than one launch takes, and so many small matrices that warps close them.
  std::vector<Layer> many(ses::sweep::kMaxLayers + 1, rational.layer(4, 1));
  many.push_back(rational.layer(5, rational.more_than_few()));
  many.push_back(rational.layer(34, rational.more_than_few()));
  rational.call("many", many);
}

// ---- the eigensolver ----

template <typename T>
void call_eigh(int n, bool compare) {
  if (n > ses::max_n_cuda(kDevice, sizeof(T))) {
    std::printf("eigh, n %d, itemsize %zu: larger than this device takes\n", n, sizeof(T));
    return;
  }
  std::vector<T> a;  // [families, n, n]
  for (int family = 0; family < families::kFamilies; ++family)
    for (const T x : families::matrix<T>(family, n, 11u * n + family)) a.push_back(x);
  std::vector<T> w(families::kFamilies * n), v(a.size()), shared(ses::jacobi_shared_bytes(n, 1));
  const OnDevice<T> device_a(a, 0), device_w(w.size()), device_v(v.size());
  ses::eigh_cuda(device_a.data(), device_w.data(), device_v.data(), families::kFamilies, n, kDevice,
                 nullptr);
  check(cudaDeviceSynchronize(), "eigh_cuda");
  if (!compare) return;

  const std::vector<T> got_w = device_w.values(), got_v = device_v.values();
  for (int family = 0; family < families::kFamilies; ++family) {
    const std::size_t at = static_cast<std::size_t>(family) * n * n, at_w = family * n;
    ses::jacobi::eigh(ses::ThreadGroup(), &a[at], &w[at_w], &v[at], n, shared.data());
    families::check(family, n, &a[at], &got_w[at_w], &got_v[at]);
  }
  const long other = differing(w, got_w) + differing(v, got_v);
  std::printf("eigh, n %d, itemsize %zu: %ld numbers differ\n", n, sizeof(T), other);
  if (other > 0) fail("eigh: other digits than on the host, n " + std::to_string(n));
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "";
  if ((mode != "check" && mode != "launch") || count < 5 || count % 2 == 0) return 2;
  std::vector<double> numbers;
  for (int i = 2; i < count; ++i) numbers.push_back(std::strtod(arguments[i], nullptr));
  const int poles = static_cast<int>(numbers.size()) / 2;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("no CUDA device");
    return 77;
  }
  const bool compare = mode == "check";
  call_rational({numbers[0], poles, &numbers[1], &numbers[1] + poles}, compare);
  for (const int n : {1, 2, 5, 16, 31, 32, 33, 62, 64, 90, 100}) {
    call_eigh<float>(n, compare);
    call_eigh<double>(n, compare);
  }
  std::puts(failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}
