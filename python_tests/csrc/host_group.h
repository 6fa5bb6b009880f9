// Host threads in the place of a thread block. With SES_DROP_SYNC its barriers do nothing:
// ThreadSanitizer has to object, or it is not looking.
#pragma once

#include <atomic>
#include <barrier>
#include <thread>
#include <vector>

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

// Calls work(group) on each of so many threads.
template <typename Work>
void run_team(int threads, const Work& work) {
  HostGroup::Shared shared(threads);
  std::vector<std::thread> team;
  for (int rank = 0; rank < threads; ++rank)
    team.emplace_back([&, rank] { work(HostGroup(&shared, rank, threads)); });
  for (auto& thread : team) thread.join();
}
