// The second stage of a divided sum: shares are added in order, so that two runs are bitwise equal.
#pragma once

#include "cuda/tile_io.cuh"

namespace ardlora::cuda {

inline constexpr int kSumThreads = 32;  // small blocks reach all multiprocessors

struct ShareSum {
  const float* partial;  // [shares, rows, stride], stride a multiple of 4
  std::int64_t stride;
  int shares;  // 0: what `out` has before, rows past `rows` become zero
  int rows;
  int columns;
  float scale;
  const float* gate;  // [rows], or null for 1
  void* out;          // [out_rows, out_stride]; rows from `rows` on become zero
  DType out_type;
  std::int64_t out_stride;
  int out_rows;
  int first_block;
};

// Up to four neighbouring floats, of which `count` exist; 0 for the others.
ARDLORA_DEVICE Word16 load_few(const float* from, int count) {
  if (count >= 4) return load16(from);
  const auto bits = [&](int e) { return e < count ? as_bits(from[e]) : 0u; };
  return {{bits(0), bits(1), bits(2), 0u}};
}

// Writes up to four neighbouring elements, of which `count` exist.
template <typename T>
ARDLORA_DEVICE void store_few(T* to, const float* v, int count) {
  if (count >= 4 && reinterpret_cast<std::uintptr_t>(to) % (4 * sizeof(T)) == 0) {
    if constexpr (sizeof(T) == 4) {
      store16(to, {{as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])}});
    } else {
      store8(to, pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]));
    }
    return;
  }
  for (int e = 0; e < 4; ++e) {
    if (e < count) to[e] = narrow<T>(v[e]);
  }
}

struct SumSharesParams {
  ShareSum sum[2];
};

__host__ __device__ constexpr std::int64_t sum_blocks(const ShareSum& s) {
  return (static_cast<std::int64_t>(s.out_rows) * ((s.columns + 3) / 4) + kSumThreads - 1) / kSumThreads;
}

// out = scale * gate o (the sum of the shares). A thread makes four columns of a row.
__global__ void __launch_bounds__(kSumThreads) sum_shares_kernel(const SumSharesParams p) {
  const int block = static_cast<int>(blockIdx.x);
  const ShareSum s = block >= p.sum[1].first_block ? p.sum[1] : p.sum[0];
  const int per_row = (s.columns + 3) / 4;
  const std::int64_t i = static_cast<std::int64_t>(block - s.first_block) * kSumThreads + threadIdx.x;
  const std::int64_t row = i / per_row;
  if (row >= s.out_rows || (s.shares == 0 && row < s.rows)) return;
  const int column = static_cast<int>(i % per_row) * 4, left = s.columns - column;
  float sum[4] = {};
  if (row < s.rows) {
    const float* from = s.partial + row * s.stride + column;
    const std::int64_t share_stride = s.rows * s.stride;
    constexpr int kAhead = 8;  // loads in flight
    for (int share = 0; share < s.shares; share += kAhead, from += kAhead * share_stride) {
      Word16 v[kAhead] = {};
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (share + i < s.shares) v[i] = load_few(from + i * share_stride, left);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        for (int e = 0; e < 4; ++e) sum[e] += as_float(v[i].part[e]);
      }
    }
    const float scale = s.gate == nullptr ? s.scale : s.scale * s.gate[row];
    for (float& v : sum) v *= scale;
  }
  const std::int64_t to = row * s.out_stride + column;
  if (s.out_type == DType::kFloat32) {
    store_few(static_cast<float*>(s.out) + to, sum, left);
  } else if (s.out_type == DType::kBFloat16) {
    store_few(static_cast<BFloat16*>(s.out) + to, sum, left);
  } else {
    store_few(static_cast<Float16*>(s.out) + to, sum, left);
  }
}

}  // namespace ardlora::cuda
