// jacobi.h with real host threads in the place of a thread block: the same bits as one thread, and
// under ThreadSanitizer no access that a barrier fails to order. With SES_DROP_SYNC the barriers do
// nothing: ThreadSanitizer has to object, or it is not looking.
#include <atomic>
#include <barrier>
#include <thread>

#include "families.h"
#include "jacobi.h"

namespace {

class HostGroup {
 public:
  struct Shared {
    explicit Shared(int threads) : barrier(threads) {}
    std::barrier<> barrier;
    std::atomic<bool> vote[3] = {false, false, false};
  };

  HostGroup(Shared* shared, int rank, int threads)
      : shared_(shared), rank_(rank), threads_(threads) {}
  int thread_rank() const { return rank_; }
  int num_threads() const { return threads_; }
  void sync() const {
#ifndef SES_DROP_SYNC
    shared_->barrier.arrive_and_wait();
#endif
  }
  bool any(bool vote) const {
    // Three ballots in turn: one being cast, one perhaps still being read, one empty.
    std::atomic<bool>& ballot = shared_->vote[turn_];
    turn_ = (turn_ + 1) % 3;
    if (rank_ == 0) shared_->vote[turn_].store(false);
    if (vote) ballot.store(true);
    shared_->barrier.arrive_and_wait();
    return ballot.load();
  }

 private:
  Shared* shared_;
  int rank_, threads_;
  mutable int turn_ = 0;
};

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
  HostGroup::Shared group(threads);
  std::vector<std::thread> team;
  for (int rank = 0; rank < threads; ++rank)
    team.emplace_back([&, rank] {
      ses::jacobi::eigh(HostGroup(&group, rank, threads), a.data(), result.w.data(),
                        result.v.data(), n, shared.data());
    });
  for (auto& thread : team) thread.join();
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

}  // namespace

int main() {
  run<float>();
  run<double>();
  std::puts("ok");
}
