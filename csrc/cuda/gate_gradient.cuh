// dg_i = <dW_i, W_i> from the gradient of W with the gates left out, then dW_i *= g_i. Right at g_i = 0 too.
#pragma once

#include "cuda/tile_io.cuh"

namespace ardlora::cuda {

inline constexpr int kGateThreads = 256;
inline constexpr int kGateShared = kGateThreads / 32 * static_cast<int>(sizeof(float));

struct GateGradientParams {
  Operand w;
  float* dw;
  std::int64_t dw_stride;
  int width;
  const float* gate;
  float* dgate;
};

// A block for each row.
template <typename T>
__global__ void __launch_bounds__(kGateThreads) gate_gradient_kernel(const GateGradientParams p) {
  begin_kernel();
  ARDLORA_SHARED(shared);
  float* const sums = reinterpret_cast<float*>(shared);
  const std::int64_t row = blockIdx.x;
  float* const dw = p.dw + row * p.dw_stride;
  const float gate = p.gate[row];
  float sum = 0.0f;
#pragma unroll 4
  for (int n = static_cast<int>(threadIdx.x); n < p.width; n += kGateThreads) {
    const std::int64_t at = row * p.w.stride + n;
    const float w = p.w.is_float ? static_cast<const float*>(p.w.data)[at] : widen(static_cast<const T*>(p.w.data)[at]);
    const float d = dw[n];
    sum += w * d;
    dw[n] = gate * d;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
  if (lane_id() == 0) sums[warp_id()] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int i = 0; i < kGateThreads / 32; ++i) total += sums[i];
  p.dgate[row] = total;
}

}  // namespace ardlora::cuda
