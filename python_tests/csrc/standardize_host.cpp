// location_scale and standardize against a plain double loop, on buffers of exactly their size.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>

#include "standardize.h"

namespace {

[[noreturn]] void fail(const char* what, long rows, long columns) {
  std::printf("%s at %ld x %ld\n", what, rows, columns);
  std::exit(1);
}

template <typename T>
void check(long batch, long rows, long columns, long padding, T magnitude) {
  const long stride = columns + padding, matrix = rows * stride;
  // The last row has no padding behind it: a read past its end is past the buffer's.
  std::unique_ptr<T[]> x(new T[batch * matrix - padding]);
  std::mt19937 random(static_cast<unsigned>(rows * 1000 + columns));
  std::normal_distribution<double> normal;
  for (long i = 0; i < batch * matrix - padding; ++i)
    x[i] = static_cast<T>(normal(random)) * magnitude;
  std::unique_ptr<T[]> location(new T[2 * batch * columns]), scale(new T[batch]);
  std::unique_ptr<T[]> out(new T[batch * rows * columns]);
  for (long b = 0; b < batch; ++b)
    for (long j = 0; j < columns; ++j) location[2 * b * columns + j] = x[b * matrix + j];
  const ses::Samples<T> samples{x.get(), matrix, stride, batch, rows, columns};
  const auto& kernels = ses::standardize_kernels<T>();
  kernels.location_scale(samples, location.get(), scale.get());
  kernels.standardize(samples, location.get(), 2 * columns, columns, scale.get(), out.get());
  const double eps = std::numeric_limits<T>::epsilon();
  for (long b = 0; b < batch; ++b) {
    double largest = 0;
    for (long j = 0; j < columns; ++j) {
      const T* column = &x[b * matrix + j];
      double mean = 0;
      for (long i = 0; i < rows; ++i) {
        mean += (double(column[i * stride]) - column[0]) / double(rows);
        largest = std::max(largest, std::fabs(double(column[i * stride] - column[0])));
      }
      for (long i = 0; i < rows; ++i) {
        const double expected = (double(column[i * stride]) - column[0] - mean) * scale[b];
        if (!(std::fabs(out[(b * rows + i) * columns + j] - expected) <= 32 * eps))
          fail("standardized value", rows, columns);
      }
    }
    const double scaled = largest * scale[b];
    if (largest > 0 ? !(scaled >= 0.5 && scaled < 1) : scale[b] != 1) fail("scale", rows, columns);
  }
  kernels.location_scale(samples, nullptr, scale.get());
  kernels.standardize(samples, nullptr, 0, 0, scale.get(), out.get());
  if (out[0] != x[0] * scale[0]) fail("uncentred value", rows, columns);
}

}  // namespace

int main() {
  for (const long rows : {1L, 2L, 63L, 64L, 65L, 200L})
    for (const long columns : {1L, 3L, 16L, 31L, 1023L, 1024L, 1025L}) {
      check<float>(2, rows, columns, 5, 1.0f);
      check<double>(1, rows, columns, 0, 1.0);
    }
  check<float>(3, 10, 40, 0, 1e-30f);
  check<float>(3, 10, 40, 0, 1e30f);
  check<double>(3, 10, 40, 0, 0.0);
  std::printf("standardize is right\n");
}
