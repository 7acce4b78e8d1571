// A factor made ready for kernels that hold many ranks: multiplied with its gates and rounded to the activations' type
// once for a call, instead of by every block that reads it. Rows are as wide as whole tiles; the rest of them is zero.
#pragma once

#include "cuda/tile_io.cuh"

namespace ardlora::cuda {

inline constexpr int kPrepareThreads = 256;

struct PreparedFactor {
  Operand w;
  const float* gate;  // of W's rows, or null
  void* out;          // [rows, stride] in the activations' type, at an address divisible by 16
  std::int64_t stride;
  int rows;
  int width;
  bool is_interleaved;  // columns in the order of `interleaved`, as expand multiplies them
};

struct PrepareParams {
  PreparedFactor factor[2];
};

// Two neighbouring elements of a row, 0 past its end.
template <typename T>
ARDLORA_DEVICE std::uint32_t load_pair(const PreparedFactor& f, std::int64_t row, int column, float gate) {
  const std::int64_t at = row * f.w.stride + column;
  if (f.w.vector && column < f.width) {
    if (f.w.is_float) {
      const Word8 v = load8(static_cast<const float*>(f.w.data) + at);
      return pack2<T>(gate * __uint_as_float(v.part[0]), gate * __uint_as_float(v.part[1]));
    }
    const auto two = *reinterpret_cast<const std::uint32_t*>(static_cast<const T*>(f.w.data) + at);
    return pack2<T>(gate * widen_low<T>(two), gate * widen_high<T>(two));
  }
  const auto value = [&](int e) {
    if (column + e >= f.width) return 0.0f;
    const float v =
        f.w.is_float ? static_cast<const float*>(f.w.data)[at + e] : widen(static_cast<const T*>(f.w.data)[at + e]);
    return gate * v;
  };
  return pack2<T>(value(0), value(1));
}

// A block for each row of the first factor, then of the second. A thread makes eight columns at a time.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const PrepareParams p) {
  begin_kernel();
  constexpr int kChunk = Tile<T>::kChunk, kGroup = 4 * kChunk;
  static_assert(sizeof(T) == 2);
  const int block = static_cast<int>(blockIdx.x);
  const PreparedFactor f = block < p.factor[0].rows ? p.factor[0] : p.factor[1];
  const std::int64_t row = block < p.factor[0].rows ? block : block - p.factor[0].rows;
  const float gate = f.gate == nullptr ? 1.0f : f.gate[row];
  T* const to = static_cast<T*>(f.out) + row * f.stride;
#pragma unroll 1
  for (int c = static_cast<int>(threadIdx.x) * kChunk; c < f.stride; c += kPrepareThreads * kChunk) {
    const int from = f.is_interleaved ? c / kGroup * kGroup + c % kGroup / kChunk * 2 : c;
    const int apart = f.is_interleaved ? kChunk : 2;  // from one pair to the next
    Word16 out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.part[i] = load_pair<T>(f, row, from + i * apart, gate);
    store16(to + c, out);
  }
}

}  // namespace ardlora::cuda
