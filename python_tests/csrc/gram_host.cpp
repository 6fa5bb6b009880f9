// location_scale, gram and gram_backward against plain loops, on buffers of exactly their size:
// every matrix has the same bits in any batch, on any number of threads and cut into any number of
// parts; AVX2 and AVX-512 agree in every bit. Samples of 16 bits give those of floats of the same
// values, and a gradient that is rounded once more.
#include <algorithm>
#include <string>

#include "families.h"
#include "gram_cpu.h"
#include "which_isa.h"

// Sixteen bits by their definition: a sign, an exponent and kMantissa bits.
template <ses::SampleType kSampleType, int kMantissa, int kBias>
struct Sixteen {
  static constexpr ses::SampleType kType = kSampleType;
  static constexpr int kInfinity = 0x8000 - (1 << kMantissa);
  unsigned short bits;

  Sixteen() = default;
  explicit Sixteen(double x) {  // to nearest, ties to even
    int exponent;
    std::frexp(x, &exponent);
    const int e = std::isfinite(x) && x != 0 ? std::max(exponent - 1, 1 - kBias) : 1 - kBias;
    const double units = std::nearbyint(std::ldexp(std::fabs(x), kMantissa - e));
    const double magnitude = ((e + kBias - 1) << kMantissa) + units;  // a carry is as it should be
    bits = std::isnan(x)            ? kInfinity + 1
           : magnitude >= kInfinity ? kInfinity
                                    : static_cast<unsigned short>(magnitude);
    if (std::signbit(x)) bits |= 0x8000;
  }
  operator double() const {
    const int magnitude = bits & 0x7fff, e = std::max(magnitude >> kMantissa, 1);
    const int units = magnitude - ((e - 1) << kMantissa);
    const double x = magnitude > kInfinity    ? std::numeric_limits<double>::quiet_NaN()
                     : magnitude == kInfinity ? std::numeric_limits<double>::infinity()
                                              : std::ldexp(units, e - kBias - kMantissa);
    return bits & 0x8000 ? -x : x;
  }
};
using Float16 = Sixteen<ses::SampleType::kFloat16, 10, 15>;
using Bfloat16 = Sixteen<ses::SampleType::kBfloat16, 7, 127>;

template <ses::SampleType kType, int kMantissa, int kBias>
struct std::numeric_limits<Sixteen<kType, kMantissa, kBias>> {
  using X = Sixteen<kType, kMantissa, kBias>;
  static double epsilon() { return std::ldexp(1, -kMantissa); }
  static double denorm_min() { return std::ldexp(1, 1 - kBias - kMantissa); }
  static double max() { return std::ldexp(2 - epsilon(), kBias); }
  static X quiet_NaN() { return X(std::numeric_limits<double>::quiet_NaN()); }
  static X infinity() { return X(std::numeric_limits<double>::infinity()); }
};

namespace {

using ses::Side;

template <typename X>
constexpr ses::SampleType sample_type() {
  if constexpr (sizeof(X) == 2)
    return X::kType;
  else
    return sizeof(X) == sizeof(float) ? ses::SampleType::kFloat32 : ses::SampleType::kFloat64;
}

struct Shape {
  long batch, rows, columns;
  Side side;
  bool center;
  double magnitude = 1;
  long n() const { return side == Side::kSamples ? rows : columns; }
  long depth() const { return side == Side::kSamples ? columns : rows; }
};

[[noreturn]] void fail(const char* what, const Shape& s, double value) {
  std::printf("FAILED: %s (%ld x %ld x %ld, %s, %s, magnitude %g: %g)\n", what, s.batch, s.rows,
              s.columns, s.side == Side::kSamples ? "samples" : "features",
              s.center ? "centred" : "uncentred", s.magnitude, value);
  std::exit(1);
}

// Rows with gaps between them, and none after the last: a read past its end is past the buffer's.
template <typename X, typename L>
struct Inputs {
  Shape shape;
  long row_stride;
  std::vector<X> x;
  std::vector<L> m, g;  // [batch, n, n] symmetric, [batch]

  explicit Inputs(const Shape& s) : shape(s), row_stride(s.columns + 5) {
    std::mt19937 random(static_cast<unsigned>(1000 * s.rows + s.columns));
    std::normal_distribution<double> normal;
    x.resize(s.batch * s.rows * row_stride - 5, std::numeric_limits<X>::quiet_NaN());
    for (long i = 0; i < s.batch * s.rows; ++i)
      for (long j = 0; j < s.columns; ++j)
        // The anchor lies to one side, so that the sums of the offsets from it grow.
        x[i * row_stride + j] =
            static_cast<X>((normal(random) + (i % s.rows == 0 ? -3 : 3)) * s.magnitude);
    const long n = s.n();
    m.resize(s.batch * n * n);
    for (long b = 0; b < s.batch; ++b)
      for (long i = 0; i < n; ++i)
        for (long j = 0; j <= i; ++j)
          m[(b * n + i) * n + j] = m[(b * n + j) * n + i] = static_cast<L>(normal(random));
    // As large as x, so that the gradient is in range.
    for (long b = 0; b < s.batch; ++b) g.push_back(static_cast<L>(normal(random) * s.magnitude));
  }

  Inputs alone(long b) const {
    Inputs one(*this);
    const long n = shape.n(), matrix = shape.rows * row_stride;
    one.shape.batch = 1;
    one.x.assign(&x[b * matrix], &x[b * matrix] + matrix - 5);
    one.m.assign(&m[b * n * n], &m[b * n * n] + n * n);
    one.g.assign(1, g[b]);
    one.x.shrink_to_fit();
    one.m.shrink_to_fit();
    return one;
  }
  X at(long b, long i, long j) const { return x[(b * shape.rows + i) * row_stride + j]; }
  const X* anchors() const { return shape.center ? x.data() : nullptr; }
  long anchor_stride() const { return shape.rows * row_stride; }
  ses::Samples samples() const {
    return {x.data(),   sample_type<X>(), shape.rows * row_stride, row_stride, shape.batch,
            shape.rows, shape.columns};
  }
};

template <typename X, typename L>
struct Outputs {
  std::vector<L> location, scale;  // [batch, 2, columns] or empty, [batch]
  std::vector<double> wide;        // [batch, n, n]
  std::vector<float> narrow;       // [batch, n, n]
  std::vector<X> gradient;         // [batch, rows, columns]

  explicit Outputs(const Inputs<X, L>& in)
      : location(in.shape.center ? 2 * in.shape.batch * in.shape.columns : 0, nan<L>()),
        scale(in.shape.batch, nan<L>()),
        wide(in.shape.batch * in.shape.n() * in.shape.n(), nan<double>()),
        narrow(wide.size(), nan<float>()),
        gradient(in.shape.batch * in.shape.rows * in.shape.columns, nan<X>()) {}
  L* centre() { return location.empty() ? nullptr : location.data(); }
  ses::Standard<L> standard(const Shape& s) {
    return {centre(), 2 * s.columns, s.columns, scale.data()};
  }
  void check_bits(const Outputs& other, const char* what, const Shape& s) const {
    if (s.center && !families::same_bits(location, other.location)) fail(what, s, 0);
    if (!families::same_bits(scale, other.scale)) fail(what, s, 0);
    if (!families::same_bits(wide, other.wide)) fail(what, s, 1);
    if (!families::same_bits(narrow, other.narrow)) fail(what, s, 2);
    if (!families::same_bits(gradient, other.gradient)) fail(what, s, 3);
  }
  Outputs alone(const Inputs<X, L>& in, long b) const {
    Outputs one(in.alone(b));
    auto copy = [b](const auto& from, auto& to) {
      std::copy_n(from.begin() + b * static_cast<long>(to.size()), to.size(), to.begin());
    };
    copy(location, one.location);
    copy(scale, one.scale);
    copy(wide, one.wide);
    copy(narrow, one.narrow);
    copy(gradient, one.gradient);
    return one;
  }

 private:
  template <typename T>
  static T nan() {
    return std::numeric_limits<T>::quiet_NaN();
  }
};

template <typename X, typename L>
Outputs<X, L> by_call(const Inputs<X, L>& in, int threads) {
  Outputs<X, L> out(in);
  const Side side = in.shape.side;
  ses::location_scale_cpu(in.samples(), in.anchors(), in.anchor_stride(), out.centre(),
                          out.scale.data(), threads);
  const ses::Standard<L> standard = out.standard(in.shape);
  ses::gram_cpu(in.samples(), standard, side, out.wide.data(), threads);
  ses::gram_cpu(in.samples(), standard, side, out.narrow.data(), threads);
  ses::gram_backward_cpu(in.m.data(), in.samples(), standard, in.g.data(), 1, side,
                         out.gradient.data(), threads);
  return out;
}

struct Workspace {
  std::size_t bytes;
  void* memory = nullptr;
  explicit Workspace(long size) : bytes(static_cast<std::size_t>(size)) {
    if (posix_memalign(&memory, 64, bytes) != 0) std::abort();
  }
  ~Workspace() { std::free(memory); }
  Workspace(const Workspace&) = delete;
  void* poisoned() const {  // NaN, should anything read what it did not write
    return std::memset(memory, 0xff, bytes);
  }
};

// Arranged for the rational solver, K has the same bits.
template <typename X, typename L>
void check_arranged(ses::Arrangement arrangement, const ses::GramKernels<L>& kernels,
                    const Inputs<X, L>& in, Outputs<X, L>& out) {
  const Shape& s = in.shape;
  const long n = s.n(), step = ses::together(arrangement, n);
  const long rows = (n + ses::kPanelColumns - 1) / ses::kPanelColumns * ses::kPanelColumns;
  const Workspace packed(kernels.arranged_bytes(arrangement, n));
  const Workspace grams(ses::arranged_doubles(arrangement, n) * static_cast<long>(sizeof(double)));
  for (long first = 0; first < s.batch; first += step) {
    const long count = std::min(step, s.batch - first);
    double* k = static_cast<double*>(grams.poisoned());
    kernels.gram_arranged(arrangement, in.samples(), out.standard(s), s.side, first,
                          static_cast<int>(count), k, packed.poisoned());
    for (long b = 0; b < count; ++b)
      for (long i = 0; i < n; ++i)
        for (long j = 0; j <= i; ++j) {
          const long panel = j / ses::kPanelColumns;
          const double got =
              arrangement == ses::Arrangement::kInterleaved
                  ? k[((b / ses::kBundle * n + i) * n + j) * ses::kBundle + b % ses::kBundle]
                  : k[(panel * rows + i) * ses::kPanelColumns + j % ses::kPanelColumns];
          const double expected = out.wide[((first + b) * n + i) * n + j];
          if (got != expected) fail("arranged gram", s, got - expected);
        }
  }
}

template <typename X, typename L>
Outputs<X, L> by_kernels(const ses::GramKernels<L>& kernels, const Inputs<X, L>& in, int parts) {
  Outputs<X, L> out(in);
  const Shape& s = in.shape;
  const long n = s.n();
  const Workspace sums(kernels.gram_bytes(n)), products(kernels.backward_bytes(n));
  const ses::Standard<L> standard = out.standard(s);
  for (long b = 0; b < s.batch; ++b) {
    L* location = s.center ? &out.location[2 * b * s.columns] : nullptr;
    const L largest =
        kernels.locate(in.samples(), b, 0, s.columns, in.anchors(), in.anchor_stride(), location);
    out.scale[b] = kernels.inverse_power_of_two(largest);
    for (int part = parts - 1; part >= 0; --part) {
      kernels.gram_double(in.samples(), standard, s.side, b, part, parts, &out.wide[b * n * n],
                          sums.poisoned());
      kernels.gram_float(in.samples(), standard, s.side, b, part, parts, &out.narrow[b * n * n],
                         sums.poisoned());
      kernels.backward(&in.m[b * n * n], in.samples(), standard, 2 * out.scale[b] * in.g[b], s.side,
                       b, part, parts, &out.gradient[b * s.rows * s.columns], products.poisoned());
    }
  }
  check_arranged(ses::Arrangement::kPanels, kernels, in, out);
  if (n <= ses::kMaxNInterleaved) check_arranged(ses::Arrangement::kInterleaved, kernels, in, out);
  return out;
}

template <typename X, typename L>
void check_location_scale(const Inputs<X, L>& in, const Outputs<X, L>& out, long b) {
  const Shape& s = in.shape;
  const double eps = std::numeric_limits<L>::epsilon();
  double largest = 0;
  for (long i = 0; i < s.rows; ++i)
    for (long j = 0; j < s.columns; ++j)
      largest = std::max(
          largest, std::fabs(double(in.at(b, i, j)) - (s.center ? double(in.at(b, 0, j)) : 0.0)));
  const L scale = out.scale[b];
  int exponent;
  if (std::frexp(scale, &exponent) != L(0.5)) fail("scale is no power of two", s, scale);
  if (largest == 0 && scale != 1) fail("scale of nothing", s, scale);
  // 1 where x - anchor was rounded up; less than 1/2 where the scale would leave the normal numbers
  const bool extreme = exponent - 1 == std::numeric_limits<L>::max_exponent - 2;
  if (largest > 0 && !(largest * scale <= 1 && (largest * scale >= 0.5 || extreme)))
    fail("scale", s, scale);
  for (long j = 0; s.center && j < s.columns; ++j) {
    if (out.location[2 * b * s.columns + j] != in.at(b, 0, j)) fail("anchor", s, in.at(b, 0, j));
    long double mean = 0;
    for (long i = 0; i < s.rows; ++i) mean += double(in.at(b, i, j)) - double(in.at(b, 0, j));
    mean /= s.rows;
    const double error = std::fabs(double(out.location[(2 * b + 1) * s.columns + j] - mean));
    if (!(error <= 4 * eps * largest + std::numeric_limits<L>::denorm_min()))
      fail("mean offset", s, error / largest);
  }
}

// sum over k of left(k) right(k), and the norms
template <typename F, typename G>
long double product(long depth, F left, G right, double* bound) {
  long double sum = 0, squares = 0, others = 0;
  for (long k = 0; k < depth; ++k) {
    const long double x = left(k), y = right(k);
    sum += x * y;
    squares += x * x;
    others += y * y;
  }
  *bound = static_cast<double>(std::sqrt(squares * others));
  return sum;
}

template <typename X, typename L>
void check_products(const Inputs<X, L>& in, const Outputs<X, L>& out, long b) {
  const Shape& s = in.shape;
  const long n = s.n(), depth = s.depth();
  const bool by_samples = s.side == Side::kSamples;
  std::vector<double> xs(static_cast<std::size_t>(n * depth));  // [n, depth]
  for (long i = 0; i < n; ++i)
    for (long k = 0; k < depth; ++k) {
      const long row = by_samples ? i : k, column = by_samples ? k : i;
      const L* anchor = s.center ? &out.location[2 * b * s.columns + column] : nullptr;
      double x = in.at(b, row, column);
      if (s.center) x = (x - double(anchor[0])) - double(anchor[s.columns]);
      xs[i * depth + k] = x * double(out.scale[b]);
    }
  const double tiny = std::numeric_limits<float>::denorm_min();
  const double wide_eps = std::numeric_limits<double>::epsilon();
  const double narrow_eps = std::numeric_limits<float>::epsilon();
  for (long i = 0; i < n; ++i)
    for (long j = 0; j <= i; ++j) {
      double bound;
      const auto row = [&](long r) {
        return [&xs, r, depth](long k) { return xs[r * depth + k]; };
      };
      const double exact = static_cast<double>(product(depth, row(i), row(j), &bound));
      const double wide = out.wide[(b * n + i) * n + j], narrow = out.narrow[(b * n + i) * n + j];
      // Squares of floats end in some bit patterns more than in others, so their sum drifts.
      if (!(std::fabs(wide - exact) <= (4 + depth / 4.0) * wide_eps * bound))
        fail("gram", s, (wide - exact) / bound);
      if (!(std::fabs(narrow - exact) <= narrow_eps * std::fabs(exact) + wide_eps * bound + tiny))
        fail("gram in float", s, (narrow - exact) / bound);
      if (out.wide[(b * n + j) * n + i] != wide || out.narrow[(b * n + j) * n + i] != narrow)
        fail("gram is not symmetric", s, wide);
    }
  const double eps = std::numeric_limits<L>::epsilon();
  const double x_eps = std::numeric_limits<X>::epsilon();
  const double coefficient = 2 * double(out.scale[b]) * double(in.g[b]);
  for (long i = 0; i < n; ++i)
    for (long k = 0; k < depth; ++k) {
      double bound;
      const double exact = static_cast<double>(product(
                               n, [&](long j) { return in.m[(b * n + i) * n + j]; },
                               [&](long j) { return xs[j * depth + k]; }, &bound)) *
                           coefficient;
      const long row = by_samples ? i : k, column = by_samples ? k : i;
      const double got = out.gradient[(b * s.rows + row) * s.columns + column];
      // Xs is rounded in L too, relative to its largest, which is near 1.
      double norm = 0;
      for (long j = 0; j < n; ++j) norm += std::fabs(double(in.m[(b * n + i) * n + j]));
      const double allowed =
          std::fabs(coefficient) * eps * ((1 + 2 * std::sqrt(n)) * bound + 2 * norm) +
          x_eps * std::fabs(exact) + std::numeric_limits<X>::denorm_min();
      if (!(std::fabs(got - exact) <= allowed)) fail("gram_backward", s, (got - exact) / allowed);
    }
}

// As floats of the same values, the gradient rounded once more.
template <typename X, typename L>
void check_widened(const ses::GramKernels<L>& kernels, const Inputs<X, L>& in,
                   const Outputs<X, L>& out) {
  Inputs<float, L> wide(in.shape);
  for (std::size_t i = 0; i < in.x.size(); ++i) wide.x[i] = static_cast<float>(double(in.x[i]));
  const Outputs<float, L> expected = by_kernels(kernels, wide, 1);
  Outputs<X, L> rounded(in);
  rounded.location = expected.location;
  rounded.scale = expected.scale;
  rounded.wide = expected.wide;
  rounded.narrow = expected.narrow;
  for (std::size_t i = 0; i < rounded.gradient.size(); ++i)
    rounded.gradient[i] = X(expected.gradient[i]);
  out.check_bits(rounded, "not the bits of floats", in.shape);
}

// Every number is widened to its value, and floats are rounded to the nearest number; at the ends
// of rows too.
template <typename X, typename L>
void check_numbers(const ses::GramKernels<L>& kernels) {
  constexpr long kNumbers = 65536 + 3;
  const Shape shape{1, 1, kNumbers, Side::kSamples, true};
  std::vector<X> x(kNumbers);
  for (long i = 0; i < kNumbers; ++i) x[i].bits = static_cast<unsigned short>(i);
  const ses::Samples samples{x.data(), X::kType, kNumbers, kNumbers, 1, 1, kNumbers};
  std::vector<L> location(2 * kNumbers);
  for (long i = 0; i < kNumbers; i += 1000)
    kernels.locate(samples, 0, i, std::min(i + 1000, kNumbers), x.data(), 0, location.data());
  for (long i = 0; i < kNumbers; ++i)
    if (!(location[i] == double(x[i])) && !(std::isnan(location[i]) && std::isnan(double(x[i]))))
      fail("widened", shape, location[i]);

  // Between neighbours, and a little to either side
  std::vector<float> values;
  for (int bits = 0; bits < 65536; bits += 7) {
    X low, high;
    low.bits = static_cast<unsigned short>(bits);
    high.bits = static_cast<unsigned short>(bits + 1);
    const float middle = static_cast<float>((double(low) + double(high)) / 2);
    for (const float direction : {-HUGE_VALF, 0.0f, HUGE_VALF})
      values.push_back(direction == 0 ? middle : std::nextafter(middle, direction));
  }
  // 1 x 1 matrices M times a row of ones
  const long width = 21;
  const std::vector<X> ones(width, X(1));
  const std::vector<L> unit(1, L(1));
  const ses::Samples row{ones.data(), X::kType, width, width, 1, 1, width};
  const Workspace products(kernels.backward_bytes(1));
  for (const float value : values) {
    const L m = value;
    std::vector<X> out(width);
    kernels.backward(&m, row, {nullptr, 0, 0, unit.data()}, 1, Side::kSamples, 0, 0, 1, out.data(),
                     products.poisoned());
    const X expected(value);
    for (const X& got : out)
      if (got.bits != expected.bits && !(std::isnan(value) && std::isnan(double(got))))
        fail("rounded", shape, value);
  }
}

template <typename X, typename L>
void check(const Shape& shape) {
  const Inputs<X, L> in(shape);
  const Outputs<X, L> out = by_call(in, 1);
  for (long b = 0; b < shape.batch; ++b) {
    check_location_scale(in, out, b);
    check_products(in, out, b);
    out.alone(in, b).check_bits(by_call(in.alone(b), 3), "batch mates change the bits", shape);
  }
  for (const int threads : {2, 5})
    out.check_bits(by_call(in, threads), "threads change the bits", shape);
  const auto& portable = ses::portable::gram_kernels<L>();
  const Outputs<X, L> whole = by_kernels(portable, in, 1);
  whole.check_bits(by_kernels(portable, in, 5), "parts change the bits", shape);
  if constexpr (sizeof(X) == 2) check_widened(portable, in, whole);
#if defined(SES_X86)
  if (shape.center && !families::same_bits(whole.location, out.location))
    fail("the width changes the location", shape, 0);
  if (!families::same_bits(whole.scale, out.scale)) fail("the width changes the scale", shape, 0);
  if (!ses::runs_here(ses::Isa::kAvx2)) return;
  const Outputs<X, L> avx2 = by_kernels(ses::avx2::gram_kernels<L>(), in, 3);
  out.check_bits(avx2, "the width changes the bits", shape);
  if constexpr (sizeof(X) == 2) check_widened(ses::avx2::gram_kernels<L>(), in, avx2);
  if (!ses::runs_here(ses::Isa::kAvx512)) return;
  avx2.check_bits(by_kernels(ses::avx512::gram_kernels<L>(), in, 2), "the width changes the bits",
                  shape);
#else
  out.check_bits(whole, "the call changes the bits", shape);
#endif
}

template <typename X, typename L>
void nan_and_inf_stay_in_their_matrix() {
  const Shape shape{5, 11, 37, Side::kSamples, true};
  Inputs<X, L> in(shape);
  const Outputs<X, L> good = by_call(in, 2);
  const long matrix = shape.rows * in.row_stride;
  in.x[1 * matrix + 3 * in.row_stride + 4] = std::numeric_limits<X>::quiet_NaN();
  in.x[3 * matrix] = std::numeric_limits<X>::infinity();
  const Outputs<X, L> bad = by_call(in, 2);
  for (const long b : {0, 2, 4})
    good.alone(in, b).check_bits(bad.alone(in, b), "NaN left its matrix", shape);
  for (const long b : {1, 3}) {
    double trace = 0;
    for (long i = 0; i < shape.rows; ++i)
      trace += bad.wide[(b * shape.rows + i) * (shape.rows + 1)];
    if (std::isfinite(trace)) fail("NaN or Inf was lost", shape, trace);
  }
}

template <typename X, typename L>
void check_all(std::initializer_list<long> sizes) {
  for (const long n : sizes)
    for (const Side side : {Side::kSamples, Side::kFeatures}) {
      const long other = n + (n > 64 ? 1 : 70);
      check<X, L>(side == Side::kSamples ? Shape{3, n, other, side, n % 2 == 1}
                                         : Shape{3, other, n, side, n % 2 == 0});
    }
  // More matrices than are arranged together, and fewer than fill the groups.
  for (const Side side : {Side::kSamples, Side::kFeatures})
    check<X, L>(side == Side::kSamples ? Shape{27, 7, 30, side, true}
                                       : Shape{27, 30, 7, side, true});
  // More than one chunk of the contracted axis, and more than one strip of columns.
  check<X, L>({1, 3, 4101, Side::kSamples, true});
  check<X, L>({2, 4101, 5, Side::kFeatures, true});
  check<X, L>({1, 64, 530, Side::kSamples, true});
  const double most = std::numeric_limits<X>::max(), least = std::numeric_limits<X>::denorm_min();
  for (const double magnitude : {0.0, 100 * least, 1e-30, 1e30, most / 64})
    if (magnitude < most)
      for (const Side side : {Side::kSamples, Side::kFeatures})
        check<X, L>({2, 9, 12, side, true, magnitude});
  nan_and_inf_stay_in_their_matrix<X, L>();
}

template <typename X>
void check_sixteen() {
  check_all<X, float>({1, 7, 8, 33});
  check<X, double>({3, 9, 37, Side::kSamples, true});
  check<X, double>({3, 37, 9, Side::kFeatures, true});
  check_numbers<X>(ses::portable::gram_kernels<float>());
#if defined(SES_X86)
  if (ses::runs_here(ses::Isa::kAvx2)) check_numbers<X>(ses::avx2::gram_kernels<float>());
  if (ses::runs_here(ses::Isa::kAvx512)) check_numbers<X>(ses::avx512::gram_kernels<float>());
#endif
}

}  // namespace

int main() {
  const auto sizes = {1L, 2L, 3L, 7L, 8L, 9L, 16L, 31L, 32L, 33L, 40L, 63L, 64L, 65L, 100L, 129L};
  check_all<float, float>(sizes);
  check_all<float, double>(sizes);
  check_all<double, double>(sizes);
  check_sixteen<Float16>();
  check_sixteen<Bfloat16>();
  std::puts("gram is right");
}
