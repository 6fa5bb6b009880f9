// jacobi.h with real host threads in the place of a thread block: the same bits as one thread, and
// under ThreadSanitizer no access that a barrier fails to order. And what no bound on an entry
// shows: that rotations do not add up to a vector that is too long.
#include "families.h"
#include "host_group.h"
#include "jacobi.h"

namespace {

template <typename T>
struct Result {
  std::vector<T> w, v;
};

template <typename T>
Result<T> solve(const std::vector<T>& a, int n, int threads) {
  Result<T> result{std::vector<T>(n), std::vector<T>(a.size())};
  std::vector<T> shared(ses::jacobi_shared_bytes(n, sizeof(T)) / sizeof(T), T(7));  // poison
  if (threads == 0) {
    ses::jacobi::eigh(ses::ThreadGroup(), a.data(), result.w.data(), result.v.data(), n,
                      shared.data());
    return result;
  }
  run_team(threads, [&](const HostGroup& group) {
    ses::jacobi::eigh(group, a.data(), result.w.data(), result.v.data(), n, shared.data());
  });
  return result;
}

template <typename T>
void run() {
  for (const int n : {1, 2, 3, 4, 7, 8, 17, 32, 65}) {
    for (int family = 0; family < families::kFamilies; ++family) {
      const auto a = families::matrix<T>(family, n, 11u * n + family);
      const Result<T> one = solve(a, n, 0);
      families::check(family, n, a.data(), one.w.data(), one.v.data());
      // A few cores take turns at every barrier: large teams get small matrices.
      for (const int threads : {1, 7, 32, 128}) {
        if (threads * n > (family == 0 ? 512 : 64)) continue;
        const Result<T> team = solve(a, n, threads);
        if (!families::same_bits(one.w, team.w) || !families::same_bits(one.v, team.v))
          families::fail("threads change the bits", family, n, threads);
      }
    }
  }
}

// The mean of |v|^2 - 1 over the eigenvectors of one matrix: rounding cancels, a bias does not.
template <typename T>
void check_lengths() {
  const int n = 64;
  const Result<T> one = solve(families::matrix<T>(families::kGaussian, n, 5u), n, 0);
  double mean = 0;
  for (const T v : one.v) mean += double(v) * v / n;
  mean -= 1;
  std::printf("n %d, itemsize %zu: mean of |v|^2 - 1 is %.2g\n", n, sizeof(T), mean);
  if (!(std::fabs(mean) < 8 * std::numeric_limits<T>::epsilon()))
    families::fail("eigenvectors of another length", families::kGaussian, n, mean);
}

}  // namespace

int main() {
  run<float>();
  run<double>();
  check_lengths<float>();
  check_lengths<double>();
  std::puts("ok");
}
