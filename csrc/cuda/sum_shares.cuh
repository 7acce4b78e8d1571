// The second stage of a divided sum: shares are added in order, so that two runs are bitwise equal.
#pragma once

#include "cuda/row_blocks.cuh"
#include "cuda/tile_io.cuh"

namespace ardlora::cuda {

inline constexpr int kSumThreads = 32;  // small blocks reach all multiprocessors

// Which rows are summed where they are sorted by expert: up to `length` of each block.
struct BlockRows {
  const RowBlock* blocks = nullptr;  // of H's rows, or of a factor's shares (RowBlockTable); null: all rows
  const DeviceSegment* segments = nullptr;
  int length = 0;
  bool of_factor = false;
};

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
  int out_rows;  // with blocks: all blocks' lengths together
  int first_block;
  BlockRows sorted = {};
};

// One row of a sum.
struct SumRow {
  std::int64_t from, to;  // in the partial sums and in `out`
  int first, end;         // shares
  int columns;
};

ARDLORA_DEVICE SumRow sum_row(const ShareSum& s, std::int64_t row) {
  if (s.sorted.blocks == nullptr) return {row, row, 0, s.shares, s.columns};
  const auto at = static_cast<int>(row / s.sorted.length), in_block = static_cast<int>(row % s.sorted.length);
  const RowBlock block = load_record(s.sorted.blocks + at);
  if (block.segment < 0) return {};
  const DeviceSegment segment = load_record(s.sorted.segments + block.segment);
  if (s.sorted.of_factor) {
    return {in_block, segment.w_begin + in_block, block.begin, block.end, in_block < segment.rank ? s.columns : 0};
  }
  const int m = block.begin + in_block;
  return {m, m, 0, s.shares, m < block.end ? segment.rank : 0};
}

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
  begin_kernel();
  const int block = static_cast<int>(blockIdx.x);
  const ShareSum s = block >= p.sum[1].first_block ? p.sum[1] : p.sum[0];
  const int per_row = (s.columns + 3) / 4;
  const std::int64_t i = static_cast<std::int64_t>(block - s.first_block) * kSumThreads + threadIdx.x;
  const std::int64_t row = i / per_row;
  if (row >= s.out_rows || (s.shares == 0 && row < s.rows)) return;
  const SumRow at = sum_row(s, row);
  const int column = static_cast<int>(i % per_row) * 4, left = at.columns - column;
  if (left <= 0) return;
  float sum[4] = {};
  if (at.from < s.rows) {
    const std::int64_t share_stride = s.rows * s.stride;
    const float* from = s.partial + at.first * share_stride + at.from * s.stride + column;
    constexpr int kAhead = 8;  // loads in flight
    for (int share = at.first; share < at.end; share += kAhead, from += kAhead * share_stride) {
      Word16 v[kAhead] = {};
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (share + i < at.end) v[i] = load_few(from + i * share_stride, left);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        for (int e = 0; e < 4; ++e) sum[e] += as_float(v[i].part[e]);
      }
    }
    const float scale = s.gate == nullptr ? s.scale : s.scale * s.gate[at.to];
    for (float& v : sum) v *= scale;
  }
  const std::int64_t to = at.to * s.out_stride + column;
  if (s.out_type == DType::kFloat32) {
    store_few(static_cast<float*>(s.out) + to, sum, left);
  } else if (s.out_type == DType::kBFloat16) {
    store_few(static_cast<BFloat16*>(s.out) + to, sum, left);
  } else {
    store_few(static_cast<Float16*>(s.out) + to, sum, left);
  }
}

}  // namespace ardlora::cuda
