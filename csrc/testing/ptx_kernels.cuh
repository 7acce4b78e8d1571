// One small kernel for each wrapper of cuda/ptx.h, of one warp where not said otherwise. ptx_main.cpp compares them
// with plain loops.
#pragma once

#include "cuda/ptx.h"

namespace ardlora::cuda::testing {

inline constexpr int kCopyThreads = 64;

// Two groups of 16-byte copies, each read by another thread: bytes past `bytes` become zero.
__global__ void copy_kernel(const unsigned char* from, unsigned char* to, int bytes) {
  ARDLORA_SHARED(shared);
  const int i = static_cast<int>(threadIdx.x), other = kCopyThreads - 1 - i;
  constexpr int kHalf = kCopyThreads * 16;
  for (int half = 0; half < 2; ++half) {
    const int at = half * kHalf + i * 16, left = bytes - at;
    const int valid = left < 0 ? 0 : (left < 16 ? left : 16);
    cp_async16(shared_address(shared + at), from + (valid > 0 ? at : 0), valid);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncthreads();
  store16_global(to + other * 16, load16(shared + other * 16));
  cp_async_wait<0>();
  __syncthreads();
  store16(to + kHalf + other * 16, load16(shared + kHalf + other * 16));
}

// rows [8 kCount, 8] of 16-bit elements; out [32, kCount] registers.
template <int kCount, bool kTrans>
__global__ void ldmatrix_kernel(const std::uint16_t* rows, std::uint32_t* out) {
  ARDLORA_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 8 * kCount) store16(shared + lane * 16, load16(rows + lane * 8));
  __syncwarp();
  std::uint32_t r[kCount];
  ldmatrix<kCount, kTrans>(r, shared_address(shared + lane % (8 * kCount) * 16));
  for (int i = 0; i < kCount; ++i) out[lane * kCount + i] = r[i];
}

// d [16, 8] += a [16, 16] b [16, 8], b given as its transpose [8, 16]; fragments as in the PTX manual, section
// "Matrix Fragments for mma.m16n8k16".
template <typename T>
__global__ void mma_kernel(const T* a, const T* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, pair = lane % 4 * 2;
  const auto two = [](const T* p) {
    return static_cast<std::uint32_t>(p[0].bits) | static_cast<std::uint32_t>(p[1].bits) << 16;
  };
  const std::uint32_t fa[4] = {two(a + group * 16 + pair), two(a + (group + 8) * 16 + pair),
                               two(a + group * 16 + pair + 8), two(a + (group + 8) * 16 + pair + 8)};
  const std::uint32_t fb[2] = {two(b + group * 16 + pair), two(b + group * 16 + pair + 8)};
  float fd[4];
  for (int i = 0; i < 4; ++i) fd[i] = d[(group + i / 2 * 8) * 8 + pair + i % 2];
  mma_k16<T>(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + pair + i % 2] = fd[i];
}

// d [16, 8] += a [16, 8] b [8, 8], b given as its transpose.
__global__ void mma_tf32_kernel(const float* a, const float* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, in_group = lane % 4, pair = in_group * 2;
  const std::uint32_t fa[4] = {to_tf32(a[group * 8 + in_group]), to_tf32(a[(group + 8) * 8 + in_group]),
                               to_tf32(a[group * 8 + in_group + 4]), to_tf32(a[(group + 8) * 8 + in_group + 4])};
  const std::uint32_t fb[2] = {to_tf32(b[group * 8 + in_group]), to_tf32(b[group * 8 + in_group + 4])};
  float fd[4];
  for (int i = 0; i < 4; ++i) fd[i] = d[(group + i / 2 * 8) * 8 + pair + i % 2];
  mma_tf32(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + pair + i % 2] = fd[i];
}

// out [4, 32]: the lane's value from lane ^ 5, lane + 3, lane 7, and the warp's sum.
__global__ void shuffle_kernel(const float* values, float* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const float v = values[lane];
  out[lane] = __shfl_xor_sync(kFullWarp, v, 5);
  out[32 + lane] = __shfl_down_sync(kFullWarp, v, 3);
  out[64 + lane] = __shfl_sync(kFullWarp, v, 7);
  float sum = v;
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
  out[96 + lane] = sum;
}

// There and back: out [n] is values rounded to T; packed [n / 2] holds pairs.
template <typename T>
__global__ void convert_kernel(const float* values, float* out, std::uint32_t* packed, int n) {
  const int i = 2 * static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  packed[i / 2] = pack2<T>(values[i], values[i + 1]);
  out[i] = widen(narrow<T>(values[i]));
  out[i + 1] = widen_high<T>(packed[i / 2]);
}

}  // namespace ardlora::cuda::testing
