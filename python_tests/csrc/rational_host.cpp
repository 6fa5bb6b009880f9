// rational_cpu against an eigendecomposition: every matrix has the same bits in any batch and layer
// and on any number of threads; AVX2 and AVX-512 agree in every bit. rational_from_samples_cpu
// against the three calls that it stands for.
//
//   rational_host 4|8 c t_1 .. t_m w_1 .. w_m     the bytes of a number of M, and the poles for it
#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "eigh.h"
#include "families.h"
#include "rational_cpu.h"
#include "rational_from_samples.h"
#include "which_isa.h"

namespace {

using families::fail;

enum Spectrum {
  kGaussian,
  kRankOne,
  kOnes,  // what one reflection leaves is nothing but rounding, and so on
  kRankDeficient,
  kRepeated,
  kPowerLaw,
  kExponential,
  kIdentity,
  kDiagonal,  // no reflections
  kBlocks,
  kTridiagonal,
  kHuge,
  kTiny,
  kSlightlyIndefinite,  // as rounding leaves a Gram matrix
  kIndefinite,          // as nothing does
  kZero,
  kNaN,
  kInf,
  kSpectra
};

using Matrix = std::vector<double>;  // [n, n]

// (I - 2 u u^T / |u|^2) A (the same), a few times
void rotate(Matrix& a, int n, std::mt19937& random) {
  std::normal_distribution<double> normal;
  for (int pass = 0; pass < 3; ++pass) {
    std::vector<double> u(n), p(n);
    double square = 0, dot = 0;
    for (double& value : u) {
      value = normal(random);
      square += value * value;
    }
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) p[i] += 2 / square * a[i * n + j] * u[j];
      dot += p[i] * u[i];
    }
    for (int i = 0; i < n; ++i) p[i] -= dot / square * u[i];
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) a[i * n + j] -= u[i] * p[j] + p[i] * u[j];
  }
}

// Its upper triangle, which is not to be read, is NaN.
Matrix gram(int spectrum, int n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  Matrix a(static_cast<std::size_t>(n) * n);
  if (spectrum == kGaussian || spectrum == kRankOne || spectrum == kHuge || spectrum == kTiny ||
      spectrum == kNaN || spectrum == kInf) {
    Matrix x(a.size());
    for (double& value : x) value = normal(random);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j)
        for (int k = 0; k < (spectrum == kRankOne ? 1 : n); ++k)
          a[i * n + j] += x[i * n + k] * x[j * n + k];
  } else {
    for (int i = 0; i < n; ++i) {
      double value = 1 + 0.1 * normal(random);
      if (spectrum == kRankDeficient && 3 * i > n) value = 0;
      if (spectrum == kRepeated) value = 1 + i % 3;
      if (spectrum == kPowerLaw) value = std::pow(1.0 + i, -4);
      if (spectrum == kExponential) value = std::exp(-i);
      if (spectrum == kIdentity) value = 1;
      if (spectrum == kSlightlyIndefinite && i == n / 2 && n > 1) value = -1e-9 * n;
      if (spectrum == kIndefinite && i == n / 2) value = -0.1;
      if (spectrum == kZero) value = 0;
      a[i * n + i] = value;
      if (i > 0 && spectrum == kTridiagonal)
        a[i * n + i - 1] = a[(i - 1) * n + i] = i % 5 == 0 ? 0 : 0.3;
      if (i > 0 && spectrum == kBlocks && i % 2 == 1) a[i * n + i - 1] = a[(i - 1) * n + i] = 0.5;
    }
    if (spectrum != kIdentity && spectrum != kDiagonal && spectrum != kBlocks &&
        spectrum != kTridiagonal)
      rotate(a, n, random);
  }
  if (spectrum == kOnes) std::fill(a.begin(), a.end(), 1.0);
  for (double& value : a) value *= spectrum == kHuge ? 1e300 : spectrum == kTiny ? 1e-300 : 1;
  const double bad = spectrum == kNaN ? std::numeric_limits<double>::quiet_NaN()
                                      : std::numeric_limits<double>::infinity();
  if (spectrum == kNaN || spectrum == kInf) a[(n - 1) * n + n / 2] = bad;
  for (int i = 0; i < n; ++i)
    for (int j = i + 1; j < n; ++j) a[i * n + j] = std::numeric_limits<double>::quiet_NaN();
  return a;
}

// To the bit, but for which NaN it is
template <typename T>
bool same_numbers(const T* x, const T* y, long count) {
  for (long i = 0; i < count; ++i)
    if (std::memcmp(x + i, y + i, sizeof(T)) != 0 && !(std::isnan(x[i]) && std::isnan(y[i])))
      return false;
  return true;
}

template <typename M>
struct Layer {
  int n;
  bool center;
  long batch;
  std::vector<double> gram;  // [batch, n, n]
  std::vector<M> h, m;       // [batch], [batch, n, n]

  Layer(int size, bool centered, std::vector<double> grams)
      : n(size),
        center(centered),
        batch(static_cast<long>(grams.size()) / (static_cast<long>(n) * n)),
        gram(std::move(grams)),
        h(batch, M(7)),
        m(gram.size(), M(7)) {}
  Layer unsolved() const { return Layer(n, center, gram); }
  Layer copies_of(long b, long count) const {
    const long size = static_cast<long>(n) * n;
    std::vector<double> copies;
    for (long i = 0; i < count; ++i)
      copies.insert(copies.end(), gram.begin() + b * size, gram.begin() + (b + 1) * size);
    return Layer(n, center, copies);
  }
  ses::GramLayer<double, M> pointers(bool with_m = true) {
    return {gram.data(), h.data(), with_m ? m.data() : nullptr, batch, n, center};
  }
  bool same(const Layer& other, long b, long other_b) const {
    const long size = static_cast<long>(n) * n;
    return same_numbers(&h[b], &other.h[other_b], 1) &&
           same_numbers(&m[b * size], &other.m[other_b * size], size);
  }
};

// Neighbours in a batch have little in common.
int spectrum_of(long i) { return static_cast<int>(7 * i % kSpectra); }

std::vector<double> mixture(int n) {
  std::vector<double> grams;
  for (int i = 0; i < kSpectra; ++i) {
    const Matrix one = gram(spectrum_of(i), n, 31u * n + i);
    grams.insert(grams.end(), one.begin(), one.end());
  }
  grams.shrink_to_fit();
  return grams;
}

// H, and K M: M alone is the logarithm of rounding in the null space.
template <typename M>
void check(const Layer<M>& layer, long b, int spectrum, const ses::Poles& poles) {
  const int n = layer.n;
  const double h = layer.h[b];
  const double* k = &layer.gram[b * n * n];
  const M* m = &layer.m[b * n * n];
  double trace = 0, largest = 0;
  for (int i = 0; i < n; ++i) trace += k[i * n + i];
  if (spectrum == kNaN || spectrum == kInf || spectrum == kIndefinite || spectrum == kZero) {
    for (int i = 0; i < n * n; ++i)
      if (spectrum == kZero ? h != 0 || m[i] != 0 : !std::isnan(h) || !std::isnan(m[i]))
        fail("zero or NaN expected", spectrum, n, h);
    return;
  }
  const bool solvable = n <= ses::kMaxNCpu;
  Matrix p(k, k + n * n), w(n), v(n * n);
  for (double& value : p) value /= trace;
  double exact = 0;
  if (solvable) ses::eigh_cpu(p.data(), w.data(), v.data(), 1, n, 1);
  for (const double value : w) exact -= value > 0 ? value * std::log(value) : 0;
  // What the poles leave of an eigenvalue, as stated in rational_coefficients.py, and rounding
  const double stated = poles.count == 24 ? 1.44e-12 : 1.8e-15;
  const double tolerance =
      spectrum == kSlightlyIndefinite
          ? 1e-6
          : n * (stated + 16 * 2.2e-16) + std::log(n) * std::numeric_limits<M>::epsilon();
  if (solvable && !(std::fabs(h - exact) <= tolerance))
    fail("entropy", spectrum, n, (h - exact) / tolerance);
  if (!std::isfinite(h)) fail("entropy", spectrum, n, h);

  const bool in_range = sizeof(M) == sizeof(double) || (spectrum != kHuge && spectrum != kTiny);
  if (!in_range) return;  // 1 / tr K is no float
  for (int i = 0; i < n * n; ++i) {
    if (!std::isfinite(m[i])) fail("not finite", spectrum, n, m[i]);
    largest = std::max(largest, std::fabs(double(m[i])));
  }
  const double rounding = std::numeric_limits<M>::epsilon() * largest;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      const double skew = std::fabs(double(m[i * n + j]) - double(m[j * n + i]));
      if (!(skew <= 16 * rounding)) fail("not symmetric", spectrum, n, skew / rounding);
      double product = 0, expected = 0;
      for (int l = 0; solvable && l < n; ++l) {
        product += k[std::max(i, l) * n + std::min(i, l)] * double(m[l * n + j]);
        const double value = w[l] > 0 ? -w[l] * (std::log(w[l]) + exact) : 0;
        expected += value * v[l * n + i] * v[l * n + j];
      }
      const double allowed = 2 * tolerance + 64 * n * 2.2e-16 + rounding * trace;
      if (!(std::fabs(product - expected) <= allowed))
        fail("gradient", spectrum, n, (product - expected) / allowed);
    }
}

template <typename M>
void solve(Layer<M>& layer, const ses::Poles& poles, int threads, bool with_m = true) {
  const auto pointers = layer.pointers(with_m);
  ses::rational_cpu(&pointers, 1, poles, threads);
}

// Of exactly its size, and NaN where anything reads what it did not write.
struct Poisoned {
  void* memory = nullptr;
  explicit Poisoned(long bytes) {
    if (posix_memalign(&memory, 64, static_cast<std::size_t>(bytes)) != 0) std::abort();
    std::memset(memory, 0xff, static_cast<std::size_t>(bytes));
  }
  ~Poisoned() { std::free(memory); }
  Poisoned(const Poisoned&) = delete;
};

template <typename M>
Layer<M> by_kernel(const ses::RationalKernel<M>& kernel, const Layer<M>& in,
                   const ses::Poles& poles) {
  Layer<M> layer = in.unsolved();
  const long n = layer.n;
  const ses::Arrangement arrangement = ses::arrangement_of(n, layer.batch);
  const long step = ses::together(arrangement, n);
  for (long first = 0; first < layer.batch; first += step) {
    ses::GramLayer<double, M> part = layer.pointers();
    ses::CpuGroup alone;
    part.batch = std::min(step, layer.batch - first);
    const Poisoned arranged(ses::arranged_doubles(arrangement, n) *
                            static_cast<long>(sizeof(double)));
    kernel.arrange(arrangement, part.gram + first * n * n, static_cast<int>(part.batch), layer.n,
                   static_cast<double*>(arranged.memory), alone);
    part.gram = static_cast<const double*>(arranged.memory);
    part.h += first;
    part.m += first * n * n;
    kernel.run(arrangement, part, poles,
               Poisoned(kernel.workspace_bytes(arrangement, layer.n, poles.count, 1)).memory,
               alone);
  }
  return layer;
}

template <typename M>
void same(const Layer<M>& one, const Layer<M>& other, const char* what) {
  for (long b = 0; b < one.batch; ++b)
    if (!one.same(other, b, b)) fail(what, spectrum_of(b), one.n, one.h[b] - other.h[b]);
}

// J M J, J = I - 11^T / n
template <typename M>
void check_centered(const Layer<M>& centered, const Layer<M>& layer, long b) {
  const int n = layer.n;
  const M *got = &centered.m[b * n * n], *m = &layer.m[b * n * n];
  std::vector<double> mean(n);
  double total = 0, largest = 0;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      mean[i] += double(m[i * n + j]) / n;
      largest = std::max(largest, std::fabs(double(m[i * n + j])));
    }
    total += mean[i] / n;
  }
  if (sizeof(M) == sizeof(float) && spectrum_of(b) == kTiny) return;  // 1 / tr K is no float
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      const double exact = m[i * n + j] - mean[i] - mean[j] + total, x = got[i * n + j];
      const bool good = std::fabs(x - exact) <= 16 * std::numeric_limits<M>::epsilon() * largest;
      if (!good && !(std::isnan(layer.h[b]) && std::isnan(x)))
        fail("centred M", spectrum_of(b), n, x - exact);
    }
}

template <typename M>
Layer<M> check_bits(const Layer<M>& in, const ses::Poles& poles) {
  Layer<M> layer = in.unsolved();
  solve(layer, poles, 1);
  // The least that are arranged as the whole batch is, and a second group that is not full
  for (const long count : {ses::kBundle / 2, ses::kBundle + 3}) {
    if (count > ses::kBundle && in.n > ses::kMaxNTwoBundles) continue;
    for (long b = 0; b < layer.batch; ++b) {
      Layer<M> copies = layer.copies_of(b, count);
      solve(copies, poles, 1);
      for (long i = 0; i < count; ++i)
        if (!layer.same(copies, b, i))
          fail("batch mates change the bits", spectrum_of(b), in.n, copies.h[i]);
    }
  }
  Layer<M> entropy = in.unsolved();
  solve(entropy, poles, 2, false);
  if (!same_numbers(entropy.h.data(), layer.h.data(), layer.batch))
    fail("entropy alone differs", -1, in.n, 0);
  if (std::any_of(entropy.m.begin(), entropy.m.end(), [](M m) { return m != 7; }))
    fail("M was not asked for", -1, in.n, 0);
#if defined(SES_X86)
  if (ses::runs_here(ses::Isa::kAvx2))
    same(layer, by_kernel(ses::avx2::rational_kernel<M>(), in, poles),
         "the width changes the bits");
  if (ses::runs_here(ses::Isa::kAvx512))
    same(layer, by_kernel(ses::avx512::rational_kernel<M>(), in, poles),
         "the width changes the bits");
#else
  same(layer, by_kernel(ses::portable::rational_kernel<M>(), in, poles),
       "the call changes the bits");
#endif
  return layer;
}

template <typename M>
void check_all(const ses::Poles& poles) {
  std::vector<Layer<M>> together;
  for (const int n : families::kSizes) {
    const Layer<M> in(n, false, mixture(n)), to_center(n, true, in.gram);
    const Layer<M> layer = check_bits(in, poles), centered = check_bits(to_center, poles);
    for (long b = 0; b < layer.batch; ++b) {
      check(layer, b, spectrum_of(b), poles);
      check_centered(centered, layer, b);
      Layer<M> alone = layer.copies_of(b, 1), pair = layer.copies_of(b, 2);  // in panels
      solve(alone, poles, 1);
      solve(pair, poles, 2);
      check(alone, 0, spectrum_of(b), poles);
      if (!alone.same(pair, 0, 0) || !alone.same(pair, 0, 1))
        fail("two differ from one", spectrum_of(b), n, alone.h[0]);
    }
#if defined(SES_X86)
    const Layer<M> portable = by_kernel(ses::portable::rational_kernel<M>(), in, poles);
    for (long b = 0; b < layer.batch; ++b) check(portable, b, spectrum_of(b), poles);
#endif
    together.push_back(n % 2 == 0 ? layer : centered);
  }
  for (const int threads : {1, 2, 5}) {
    std::vector<Layer<M>> again;
    for (const Layer<M>& layer : together) again.push_back(layer.unsolved());
    std::vector<ses::GramLayer<double, M>> pointers;
    for (Layer<M>& layer : again) pointers.push_back(layer.pointers());
    ses::rational_cpu(pointers.data(), static_cast<int>(pointers.size()), poles, threads);
    for (std::size_t i = 0; i < again.size(); ++i)
      same(together[i], again[i], "layers and threads change the bits");
  }
}

// Two threads, the second of which leaves at a barrier. By a mutex: ThreadSanitizer sees no atomics
// of a driver.
struct Pair {
  int left, arrived = 0;
  long turn = 0;
  std::mutex mutex;
  std::condition_variable turned;

  explicit Pair(int barriers) : left(barriers) {}
  static int wait(void* pair, int rank, int threads) {
    Pair& self = *static_cast<Pair*>(pair);
    std::unique_lock<std::mutex> lock(self.mutex);
    if (++self.arrived == threads) {
      self.arrived = 0;
      --self.left;
      ++self.turn;
      self.turned.notify_all();
    } else {
      self.turned.wait(lock, [&self, turn = self.turn] { return self.turn != turn; });
    }
    return self.left > 0 ? threads : rank == 0 ? 1 : 0;
  }
};

template <typename M>
Layer<M> by_pair(const ses::RationalKernel<M>& kernel, const Layer<M>& in, const ses::Poles& poles,
                 int barriers) {
  Layer<M> layer = in.unsolved();
  const ses::Arrangement arrangement = ses::Arrangement::kPanels;
  const Poisoned arranged(ses::arranged_doubles(arrangement, layer.n) *
                          static_cast<long>(sizeof(double)));
  const Poisoned workspace(kernel.workspace_bytes(arrangement, layer.n, poles.count, 2));
  Pair pair(barriers);
  const auto solve_one = [&](int rank) {
    ses::CpuGroup group{rank, 2, Pair::wait, &pair};
    ses::GramLayer<double, M> one = layer.pointers();
    kernel.arrange(arrangement, one.gram, 1, layer.n, static_cast<double*>(arranged.memory), group);
    if (!group.sync()) return;
    one.gram = static_cast<const double*>(arranged.memory);
    kernel.run(arrangement, one, poles, workspace.memory, group);
    group.sync();
  };
  std::thread other(solve_one, 1);
  solve_one(0);
  other.join();
  return layer;
}

// A matrix that several threads solve together has the bits of one, also where a thread leaves.
template <typename M>
void check_groups(const ses::Poles& poles) {
  const int n = 2 * ses::kMinColumnsOfAPart + 1;
  for (const int spectrum : {kGaussian, kOnes, kNaN}) {
    Layer<M> alone(n, spectrum == kGaussian, gram(spectrum, n, 31u * n));
    solve(alone, poles, 1);
    check(alone, 0, spectrum, poles);
    for (const int threads : {2, 3}) {
      Layer<M> shared = alone.unsolved();
      solve(shared, poles, threads);
      if (!alone.same(shared, 0, 0)) fail("threads change the bits", spectrum, n, threads);
    }
  }
  const auto& kernel = ses::portable::rational_kernel<M>();
  const Layer<M> in(n, true, gram(kGaussian, n, 7u)), alone = by_kernel(kernel, in, poles);
  // In the tridiagonalisation, in each third of a pass of the reflections, and never
  for (const int barriers : {101, n + 42, n + 43, n + 44, 10 * n})
    if (!alone.same(by_pair(kernel, in, poles, barriers), 0, 0))
      fail("a thread that leaves changes the bits", kGaussian, n, barriers);
}

template <typename T>
struct SampleCase {
  long batch, rows, columns;
  bool center;
  std::vector<T> x, location, scale, h, m;

  SampleCase(long b, long r, long c, bool centred)
      : batch(b), rows(r), columns(c), center(centred) {
    std::mt19937 random(static_cast<unsigned>(1000 * r + c));
    std::normal_distribution<double> normal;
    for (long i = 0; i < b * r * c; ++i) x.push_back(static_cast<T>(normal(random) + 3));
    const T nan = std::numeric_limits<T>::quiet_NaN();
    if (b > 3) std::fill_n(&x[3 * r * c], r * c, T(1));  // no variance
    if (b > 4) x[4 * r * c] = nan;
    location.assign(center ? b * 2 * c : 0, nan);
    scale.assign(b, nan);
    m.assign(b * n() * n(), nan);
    h.assign(b, nan);
  }
  bool by_samples() const { return rows <= columns; }
  int n() const { return static_cast<int>(by_samples() ? rows : columns); }
  ses::SampleLayer<T> layer() {
    const bool single = sizeof(T) == sizeof(float);
    return {{x.data(), single ? ses::SampleType::kFloat32 : ses::SampleType::kFloat64,
             rows * columns, columns, batch, rows, columns},
            by_samples() ? ses::Side::kSamples : ses::Side::kFeatures,
            center ? location.data() : nullptr,
            scale.data(),
            {nullptr, h.data(), m.data(), batch, n(), center && by_samples()}};
  }
  void solve_in_steps(const ses::Poles& poles) {
    ses::SampleLayer<T> all = layer();
    ses::location_scale_cpu(all.x, center ? x.data() : nullptr, rows * columns, all.location,
                            all.scale, 1);
    std::vector<double> grams(m.size());
    const ses::Standard<T> standard{all.location, 2 * columns, columns, all.scale};
    ses::gram_cpu(all.x, standard, all.side, grams.data(), 1);
    all.result.gram = grams.data();
    ses::rational_cpu(&all.result, 1, poles, 1);
  }
  bool same(const SampleCase& other) const {
    const auto equal = [](const auto& a, const auto& b) {
      return same_numbers(a.data(), b.data(), static_cast<long>(a.size()));
    };
    return equal(location, other.location) && equal(scale, other.scale) && equal(m, other.m) &&
           equal(h, other.h);
  }
};

template <typename T>
void check_from_samples(const ses::Poles& poles) {
  std::vector<SampleCase<T>> expected;
  for (const bool center : {true, false})
    for (const auto& [rows, columns] : {std::pair<long, long>{1, 3},
                                        {5, 7},
                                        {8, 8},
                                        {9, 70},
                                        {70, 9},
                                        {32, 130},
                                        {33, 40},
                                        {200, 65}})
      for (const long batch : {1, 2, 19}) expected.emplace_back(batch, rows, columns, center);
  for (SampleCase<T>& one : expected) one.solve_in_steps(poles);
  // All together, then in calls too small for every worker to have matrices of its own.
  for (const int threads : {1, 2, 5}) {
    for (const std::size_t step : {expected.size(), std::size_t(1), std::size_t(2)}) {
      for (std::size_t first = 0; first < expected.size(); first += step) {
        std::vector<SampleCase<T>> got;
        const std::size_t last = std::min(first + step, expected.size());
        for (std::size_t i = first; i < last; ++i) {
          const SampleCase<T>& one = expected[i];
          got.emplace_back(one.batch, one.rows, one.columns, one.center);
        }
        std::vector<ses::SampleLayer<T>> layers;
        for (SampleCase<T>& one : got) layers.push_back(one.layer());
        ses::rational_from_samples_cpu(layers.data(), static_cast<int>(layers.size()), poles,
                                       threads);
        for (std::size_t i = first; i < last; ++i)
          if (!got[i - first].same(expected[i]))
            fail("one call differs", -1, got[i - first].n(), 0);
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 5 || count % 2 == 0) return 2;
  std::vector<double> numbers;
  for (int i = 2; i < count; ++i) numbers.push_back(std::strtod(arguments[i], nullptr));
  const int poles = static_cast<int>(numbers.size()) / 2;
  const ses::Poles set{numbers[0], poles, &numbers[1], &numbers[1] + poles};
  if (arguments[1][0] == '4')
    check_all<float>(set), check_groups<float>(set), check_from_samples<float>(set);
  else
    check_all<double>(set), check_from_samples<double>(set);
  std::puts("rational is right");
}
