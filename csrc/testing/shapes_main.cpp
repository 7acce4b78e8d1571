// Prints threads and the most dynamic shared memory of a block for each kernel: what the compiler alone does not know.
#include <cstdio>

#include "cuda/importance.cuh"
#include "cuda/rank_resize.cuh"
#include "cuda/regularizer.cuh"

int main() {
  using namespace ardlora::cuda;
  const struct {
    const char* kernel;  // without template arguments
    int threads;
    std::size_t shared;
  } shapes[] = {
      {"rank_resize_kernel", kResizeThreads, 0}, {"row_sums_kernel", kRowThreads, 0},
      {"importance_kernel", kRowThreads, 0},     {"all_finite_kernel", kFiniteThreads, kFiniteShared},
      {"prox_kernel", kUnitThreads, 0},          {"gates_kernel", kUnitThreads, 0},
  };
  for (const auto& s : shapes) std::printf("%s %d %zu\n", s.kernel, s.threads, s.shared);
  return 0;
}
