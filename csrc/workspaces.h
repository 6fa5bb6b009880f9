// Memory that the workers of a CPU call compute in.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>

namespace ses {

// One aligned piece of memory for each worker. What a call used is kept for the next one: fresh
// pages would cost more than small matrices do.
class Workspaces {
 public:
  Workspaces(long bytes, int workers) : bytes_((bytes + kPage - 1) / kPage * kPage) {
    const long size = kPage + bytes_ * workers;
    block_ = kept.exchange(nullptr);
    if (block_ != nullptr && block_->size >= size) return;
    std::free(block_);
    void* memory = std::aligned_alloc(kPage, static_cast<std::size_t>(size));
    if (!memory) throw std::bad_alloc();
    block_ = new (memory) Block{size};
  }
  ~Workspaces() { std::free(block_->size > kMostKept ? block_ : kept.exchange(block_)); }
  Workspaces(const Workspaces&) = delete;
  Workspaces& operator=(const Workspaces&) = delete;

  void* operator[](int worker) const {
    return reinterpret_cast<char*>(block_) + kPage + worker * bytes_;
  }

 private:
  static constexpr long kPage = 4096, kMostKept = 32L << 20;
  struct Block {
    long size;
  };
  static inline std::atomic<Block*> kept{nullptr};

  long bytes_;
  Block* block_;
};

}  // namespace ses
