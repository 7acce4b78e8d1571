// Prints threads and the most dynamic shared memory of a block for each kernel: what the compiler alone does not know.
#include <cstdio>

#include "cuda/gate_gradient.cuh"
#include "cuda/gemm_plan.h"
#include "cuda/importance.cuh"
#include "cuda/prepare.cuh"
#include "cuda/rank_resize.cuh"
#include "cuda/regularizer.cuh"
#include "cuda/row_blocks.cuh"
#include "cuda/sum_shares.cuh"

int main() {
  using namespace ardlora::cuda;
  const struct {
    const char* kernel;  // template arguments only where they matter
    int threads;
    std::size_t shared;
  } shapes[] = {
      {"shrink_kernel", kShrinkThreads, shrink_shared(kRankTile)},
      {"wide_shrink_kernel", kWideThreads, shrink_shared(kWideRanks)},
      {"expand_kernel", kExpandThreads, expand_shared(2, kRankTile, 2, true)},
      {"expand_kernel<float>", kExpandThreads, expand_shared(4, kRankTile / 2, 2, true)},
      {"wide_expand_kernel", kExpandThreads, expand_shared(2, kRankTile, 2, true, true)},
      {"outer_kernel", kOuterThreads, outer_shared(2, kRankTile)},
      {"outer_kernel<float>", kOuterThreads, outer_shared(4, kRankTile)},
      {"outer_shrink_kernel", kOuterThreads, outer_shrink_shared(2, 2 * kOnePassRanks)},
      {"prepare_kernel", kPrepareThreads, 0},
      {"row_blocks_kernel", kRowBlockThreads, 0},
      {"sum_shares_kernel", kSumThreads, 0},
      {"gate_gradient_kernel", kGateThreads, kGateShared},
      {"rank_resize_kernel", kResizeThreads, 0},
      {"row_sums_kernel", kRowThreads, 0},
      {"importance_kernel", kRowThreads, 0},
      {"all_finite_kernel", kFiniteThreads, kFiniteShared},
      {"gates_kernel", kUnitThreads, 0},
  };
  for (const auto& s : shapes) std::printf("%s %d %zu\n", s.kernel, s.threads, s.shared);
  return 0;
}
