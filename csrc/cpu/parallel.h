// Splits [0, n) into one contiguous chunk per thread, in whole grains. The caller passes torch's thread count.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace ardlora::cpu {

// fn(begin, end). Runs on the calling thread when there is one chunk, or inside another parallel region.
template <typename F>
void parallel_for(std::int64_t n, std::int64_t grain, int threads, F&& fn) {
  if (n <= 0) return;
  const std::int64_t grains = (n + grain - 1) / grain;
  const int used = static_cast<int>(std::clamp<std::int64_t>(threads, 1, grains));
#if defined(_OPENMP)
  if (used > 1 && !omp_in_parallel()) {
    std::exception_ptr error = nullptr;
#pragma omp parallel num_threads(used)
    {
      const std::int64_t id = omp_get_thread_num();
      const std::int64_t team = omp_get_num_threads();
      const std::int64_t begin = std::min(n, grains * id / team * grain);
      const std::int64_t end = std::min(n, grains * (id + 1) / team * grain);
      try {
        if (begin < end) fn(begin, end);
      } catch (...) {
#pragma omp critical
        error = std::current_exception();
      }
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  fn(0, n);
}

// Threads worth waking for `flops` of work: below about 20 us of arithmetic the wake-up costs more than it saves.
inline int useful_threads(int threads, double flops) {
  constexpr double kFlopsPerThread = 4e5;
  return static_cast<int>(std::clamp(flops / kFlopsPerThread, 1.0, static_cast<double>(std::max(threads, 1))));
}

}  // namespace ardlora::cpu
