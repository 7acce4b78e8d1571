// Scratch memory of a call: a pointer that moves through one block. The block stays with the thread that called, so
// that a training step allocates nothing; it is as large as the largest call so far.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace ardlora::cpu {

class Arena {
 public:
  // The calling thread's own, in use until the value dies.
  class Use {
   public:
    Use() : arena_(local()), outer_(arena_.depth_++ > 0) {}
    ~Use() {
      --arena_.depth_;
      if (!outer_) arena_.rewind();
    }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    // Uninitialised, aligned to cache lines.
    template <typename T>
    T* take(std::int64_t count) {
      return static_cast<T*>(arena_.take(static_cast<std::size_t>(count) * sizeof(T)));
    }

   private:
    Arena& arena_;
    bool outer_;
  };

 private:
  static constexpr std::size_t kLine = 64;
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kLine}); }
  };
  struct Block {
    std::unique_ptr<std::byte, Free> data;
    std::size_t size;
  };

  static Arena& local() {
    thread_local Arena arena;
    return arena;
  }
  static Block block(std::size_t size) {
    return {std::unique_ptr<std::byte, Free>(static_cast<std::byte*>(::operator new(size, std::align_val_t{kLine}))),
            size};
  }
  void* take(std::size_t bytes) {
    bytes = (bytes + kLine - 1) / kLine * kLine;
    if (blocks_.empty() || used_ + bytes > blocks_.back().size) {
      blocks_.push_back(block(bytes + (std::size_t{1} << 16)));
      used_ = 0;
    }
    std::byte* p = blocks_.back().data.get() + used_;
    used_ += bytes;
    return p;
  }
  // What did not fit in one block does so the next time.
  void rewind() {
    used_ = 0;
    if (blocks_.size() <= 1) return;
    std::size_t total = 0;
    for (const Block& b : blocks_) total += b.size;
    blocks_.clear();
    blocks_.push_back(block(total));
  }

  std::vector<Block> blocks_;
  std::size_t used_ = 0;
  int depth_ = 0;
};

}  // namespace ardlora::cpu
