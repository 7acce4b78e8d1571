// Threads: OpenMP's, as many as the caller passes (torch's count). Nothing here decides what a result is: every split
// is of work whose results do not depend on it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

// ARDLORA_STD_THREADS: std::thread instead, and for any work, however small. For ThreadSanitizer, which does not know
// how OpenMP's runtime synchronises.
#if defined(ARDLORA_STD_THREADS)
#include <pthread.h>

#include <mutex>
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace ardlora::cpu {

#if defined(ARDLORA_STD_THREADS)
// Not std::barrier, in which ThreadSanitizer does not see who waits for whom.
class Barrier {
 public:
  explicit Barrier(int threads) { pthread_barrier_init(&barrier_, nullptr, static_cast<unsigned>(threads)); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};
#endif

struct Range {
  std::int64_t begin, end;
};

// One thread among those of a parallel region.
struct Team {
  std::int64_t id = 0;
  std::int64_t size = 1;
#if defined(ARDLORA_STD_THREADS)
  Barrier* all = nullptr;
#endif

  // This thread's part of [0, n), in whole grains.
  Range share(std::int64_t n, std::int64_t grain) const {
    const std::int64_t grains = (n + grain - 1) / grain;
    return {std::min(n, grains * id / size * grain), std::min(n, grains * (id + 1) / size * grain)};
  }
  // Whether a piece of work is this thread's, given how much lies before it and in all.
  bool owns(double before, double total) const {
    return static_cast<std::int64_t>(before / total * static_cast<double>(size)) == id;
  }
  void barrier() const {
#if defined(ARDLORA_STD_THREADS)
    if (all != nullptr) all->wait();
#elif defined(_OPENMP)
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
};

// fn(team) on each of up to `threads` threads; on the calling thread alone inside another parallel region. fn must not
// throw: its barriers would wait for ever.
template <typename F>
void parallel_region([[maybe_unused]] int threads, F&& fn) {
#if defined(ARDLORA_STD_THREADS)
  if (threads > 1) {
    Barrier all(threads);
    std::vector<std::jthread> others;
    for (int id = 1; id < threads; ++id) others.emplace_back([&, id] { fn(Team{id, threads, &all}); });
    fn(Team{0, threads, &all});
    return;
  }
#elif defined(_OPENMP)
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    fn(Team{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  fn(Team{});
}

// As parallel_region for an fn without barriers: what one of them throws is thrown here.
template <typename F>
void parallel_tasks(int threads, F&& fn) {
  std::exception_ptr error = nullptr;
#if defined(ARDLORA_STD_THREADS)
  std::mutex one;
#endif
  parallel_region(threads, [&](const Team& team) {
    try {
      fn(team);
    } catch (...) {
#if defined(ARDLORA_STD_THREADS)
      const std::lock_guard<std::mutex> alone(one);
#elif defined(_OPENMP)
#pragma omp critical
#endif
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// fn(begin, end) for one contiguous chunk of [0, n) per thread, in whole grains.
template <typename F>
void parallel_for(std::int64_t n, std::int64_t grain, int threads, F&& fn) {
  if (n <= 0) return;
  const std::int64_t grains = (n + grain - 1) / grain;
  parallel_tasks(static_cast<int>(std::clamp<std::int64_t>(threads, 1, grains)), [&](const Team& team) {
    const Range part = team.share(n, grain);
    if (part.begin < part.end) fn(part.begin, part.end);
  });
}

// Threads worth waking for `flops` of work: below some 5 us of it the wake-up costs more than it saves.
inline int useful_threads(int threads, double flops) {
#if defined(ARDLORA_STD_THREADS)
  constexpr double kFlopsPerThread = 1.0;
#else
  constexpr double kFlopsPerThread = 5e5;
#endif
  return static_cast<int>(std::clamp(flops / kFlopsPerThread, 1.0, static_cast<double>(std::max(threads, 1))));
}

}  // namespace ardlora::cpu
