// Matrices and checks for the C++ test drivers.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace families {

// Around every boundary of a tile, a group of lanes and a limit; under a sanitizer, which makes the
// kernels several times slower and is not there for digits, one size of each kind.
#if defined(SES_FEW_SIZES)
constexpr int kSizes[] = {1, 3, 8, 9, 33, 65, 129};
#else
constexpr int kSizes[] = {1, 2, 3, 7, 8, 9, 16, 31, 32, 33, 40, 63, 64, 65, 100, 129};
#endif

enum Family {
  kGaussian,
  kRankTwo,
  kRepeated,
  kGraded,
  kBand,
  kZero,
  kIdentity,
  kHuge,
  kTiny,
  kNaN
};
constexpr int kFamilies = kNaN + 1;

inline void fail(const char* what, int family, int n, double value) {
  std::printf("FAILED: %s (family %d, n %d, %g)\n", what, family, n, value);
  std::exit(1);
}

template <typename T>
std::vector<T> matrix(int family, int n, unsigned seed) {  // [n, n]
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> x(static_cast<std::size_t>(n) * n), a(x.size(), 0.0);
  for (double& value : x) value = normal(random);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) {
      double value = x[i * n + j];
      if (family == kRankTwo) value = x[i] * x[j] + (n > 1 ? x[n + i] * x[n + j] : 0);
      if (family == kRepeated) value = (i == j) - 2 * x[i] * x[j] / n;
      if (family == kGraded) value *= std::pow(1e-8, double(i + j) / (2 * n));
      if (family == kBand) value = i - j <= 1 ? value : 0;
      if (family == kZero) value = 0;
      if (family == kIdentity) value = i == j;
      if (family == kHuge) value *= 1e30;
      if (family == kTiny) value *= 1e-30;
      a[i * n + j] = a[j * n + i] = value;
    }
  }
  if (family == kNaN) a[(n - 1) * n + n / 2] = std::numeric_limits<double>::quiet_NaN();
  return {a.begin(), a.end()};
}

// ||A V - V W|| / ||A|| and ||V^T V - I|| in units of n eps, or NaN throughout for kNaN.
template <typename T>
void check(int family, int n, const T* a, const T* w, const T* v) {
  if (family == kNaN) {
    for (int i = 0; i < n; ++i)
      if (!std::isnan(w[i]) || !std::isnan(v[i * n])) fail("expected NaN", family, n, w[i]);
    return;
  }
  double norm = 0, residual = 0, orthogonality = 0;
  for (int i = 0; i < n; ++i) {
    if (i > 0 && !(w[i - 1] <= w[i])) fail("not ascending", family, n, w[i]);
    for (int j = 0; j < n; ++j) {
      double av = 0, vv = 0;
      for (int k = 0; k < n; ++k) {
        av += double(a[i * n + k]) * v[j * n + k];
        vv += double(v[i * n + k]) * v[j * n + k];
      }
      norm += double(a[i * n + j]) * a[i * n + j];
      residual += std::pow(av - double(v[j * n + i]) * w[j], 2);
      orthogonality += std::pow(vv - (i == j), 2);
    }
  }
  const double unit = n * double(std::numeric_limits<T>::epsilon());
  residual = norm > 0 ? std::sqrt(residual / norm) / unit : std::sqrt(residual);
  orthogonality = std::sqrt(orthogonality) / unit;
  if (!(residual < 5)) fail("residual", family, n, residual);
  if (!(orthogonality < 30)) fail("orthogonality", family, n, orthogonality);
}

template <typename T>
bool same_bits(const std::vector<T>& x, const std::vector<T>& y) {
  return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
}

}  // namespace families
