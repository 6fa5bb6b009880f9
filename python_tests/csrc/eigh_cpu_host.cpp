// eigh_cpu with several threads and batch sizes: every matrix has the bits it has alone, on every
// width of SIMD; AVX2 and AVX-512 agree in every bit.
#include <algorithm>

#include "eigh.h"
#include "eigh_cpu.h"
#include "families.h"
#include "which_isa.h"

namespace {

template <typename T>
struct Batch {
  std::vector<T> a, w, v;
  std::vector<int> family;
};

// A new matrix each: exact sizes, so that AddressSanitizer sees one element too many.
template <typename T>
Batch<T> make(int batch, int n) {
  Batch<T> data;
  for (int i = 0; i < batch; ++i) {
    data.family.push_back(i % families::kFamilies);
    const auto a = families::matrix<T>(data.family.back(), n, 31u * n + i);
    data.a.insert(data.a.end(), a.begin(), a.end());
  }
  data.w.assign(static_cast<std::size_t>(batch) * n, T(7));
  data.v.assign(data.a.size(), T(7));
  return data;
}

template <typename T>
void threads_and_batches(int n, int batch) {
  Batch<T> all = make<T>(batch, n);
  ses::eigh_cpu(all.a.data(), all.w.data(), all.v.data(), batch, n, 1);
  const std::size_t size = static_cast<std::size_t>(n) * n;
  for (int i = 0; i < batch; ++i)
    families::check(all.family[i], n, &all.a[i * size], &all.w[i * n], &all.v[i * size]);
  for (const int threads : {2, 5}) {
    Batch<T> other = make<T>(batch, n);
    ses::eigh_cpu(other.a.data(), other.w.data(), other.v.data(), batch, n, threads);
    if (!families::same_bits(all.w, other.w) || !families::same_bits(all.v, other.v))
      families::fail("threads change the bits", -1, n, threads);
  }
  for (int i = 0; i < batch; i += 3) {
    std::vector<T> a(&all.a[i * size], &all.a[i * size] + size), w(n), v(size);
    ses::eigh_cpu(a.data(), w.data(), v.data(), 1, n, 1);
    if (std::memcmp(w.data(), &all.w[i * n], n * sizeof(T)) != 0 ||
        std::memcmp(v.data(), &all.v[i * size], size * sizeof(T)) != 0)
      families::fail("batch mates change the bits", all.family[i], n, i);
  }
}

template <typename T>
Batch<T> solve_with(const ses::BundleKernel<T>& kernel, int n) {
  const int count = std::max(1, kernel.lanes - 1);
  Batch<T> data = make<T>(count, n);
  const std::size_t bytes = (static_cast<std::size_t>(kernel.workspace_bytes(n)) + 63) / 64 * 64;
  void* workspace = std::aligned_alloc(64, bytes);
  std::memset(workspace, 0xff, bytes);  // NaN, should anything read what it did not write
  kernel.run(data.a.data(), data.w.data(), data.v.data(), count, n, workspace);
  std::free(workspace);
  for (int i = 0; i < count; ++i)
    families::check(data.family[i], n, &data.a[i * n * n], &data.w[i * n], &data.v[i * n * n]);
  return data;
}

template <typename T>
void widths(int n) {
  for (const auto& kernel : ses::portable::bundle_kernels<T>().of_size) solve_with(kernel, n);
#if defined(SES_X86)
  if (!ses::runs_here(ses::Isa::kAvx2)) return;
  const Batch<T> narrow = solve_with(ses::avx2::bundle_kernels<T>().of_size[1], n);
  const bool avx512 = ses::runs_here(ses::Isa::kAvx512);
  for (int i = 0; i < 2 * ses::kBundleSizes; ++i) {
    if (i >= ses::kBundleSizes && !avx512) break;
    const Batch<T> other =
        i < ses::kBundleSizes
            ? solve_with(ses::avx2::bundle_kernels<T>().of_size[i], n)
            : solve_with(ses::avx512::bundle_kernels<T>().of_size[i - ses::kBundleSizes], n);
    const std::size_t w = std::min(narrow.w.size(), other.w.size());
    const std::size_t v = std::min(narrow.v.size(), other.v.size());
    if (std::memcmp(narrow.w.data(), other.w.data(), w * sizeof(T)) != 0 ||
        std::memcmp(narrow.v.data(), other.v.data(), v * sizeof(T)) != 0)
      families::fail("the width changes the bits", -1, n, i);
  }
#endif
}

}  // namespace

int main() {
  for (const int n : {1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 64, 127, 128}) {
    widths<float>(n);
    widths<double>(n);
  }
  for (const int n : {1, 7, 32, 65}) {
    threads_and_batches<float>(n, n > 32 ? 37 : 150);
    threads_and_batches<double>(n, n > 32 ? 37 : 150);
  }
  std::puts(ses::isa_name(ses::isa_in_use()));
}
