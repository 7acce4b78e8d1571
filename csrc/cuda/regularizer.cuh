// ARD-LoRA's small steps for all units of a model in one launch each; the formulas are the CPU's.
#pragma once

#include <cstdint>

#include "core/regularizer_formulas.h"
#include "cuda/ptx.h"

namespace ardlora::cuda {

inline constexpr int kUnitThreads = 128;

// `step` as in `proximal_value`.
__global__ void __launch_bounds__(kUnitThreads) prox_kernel(ProxParams p, double step) {
  const std::int64_t u = static_cast<std::int64_t>(blockIdx.x) * kUnitThreads + threadIdx.x;
  if (u >= p.units) return;
  p.alpha[u] = proximal_value(p.alpha[u], p.grad[u], p.weight[u], p.lo[u], p.hi[u], step, p.price);
}

// A block has one unit.
__global__ void __launch_bounds__(kUnitThreads)
    gates_kernel(const GateBlock* __restrict__ blocks, const double* __restrict__ rho, GateParams p) {
  const GateBlock unit = blocks[blockIdx.x];
  float* gate = as_global(unit.gate);
  const double soft_rank = rho[blockIdx.x];
  for (std::int64_t j = threadIdx.x; j < unit.count; j += kUnitThreads) {
    gate[j] = static_cast<float>(gate_formula(p, soft_rank, j));
  }
}

}  // namespace ardlora::cuda
