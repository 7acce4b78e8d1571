// ARD-LoRA's gates of all units of a model in one launch; the formula is the CPU's.
#pragma once

#include <cstdint>

#include "core/regularizer_formulas.h"
#include "cuda/ptx.h"

namespace ardlora::cuda {

inline constexpr int kUnitThreads = 128;

// A block has one unit.
__global__ void __launch_bounds__(kUnitThreads)
    gates_kernel(const GateBlock* __restrict__ blocks, const double* __restrict__ rho, GateParams p) {
  begin_kernel();
  const GateBlock unit = blocks[blockIdx.x];
  float* gate = as_global(unit.gate);
  const double soft_rank = rho[blockIdx.x];
  for (std::int64_t j = threadIdx.x; j < unit.count; j += kUnitThreads) {
    gate[j] = static_cast<float>(gate_formula(p, soft_rank, j));
  }
}

}  // namespace ardlora::cuda
