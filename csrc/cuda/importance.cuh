// Passes over the rows of many factors and their gradients (row_table.h). A warp has one row: its lanes read
// neighbouring 16 bytes, and sum in a fixed order.
#pragma once

#include <cstdint>

#include "cuda/ptx.h"
#include "cuda/row_table.h"

namespace ardlora::cuda {

inline constexpr int kRowThreads = 128;
inline constexpr int kRowsPerBlock = kRowThreads / 32;
inline constexpr int kFiniteThreads = 256;
inline constexpr std::size_t kFiniteShared = kFiniteThreads / 32 * sizeof(float);

struct ImportanceStep {
  float beta1, one_minus_beta1;  // of the sensitivity
  float beta2, one_minus_beta2;  // of the uncertainty
  const float* finite;           // 0: leave everything as it is
  float* score;                  // [rows]
};

ARDLORA_DEVICE float warp_sum(float value) {
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(kFullWarp, value, mask);
  return value;
}

// kCount neighbours as floats: 16 bytes at once, 8 bytes, or one element.
template <int kCount, typename T>
ARDLORA_DEVICE void load_floats(const T* from, float* to) {
  if constexpr (kCount == 1) {
    to[0] = widen(*from);
  } else if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < kCount; i += 4) {
      const Word16 w = load16(from + i);
      for (int e = 0; e < 4; ++e) to[i + e] = __uint_as_float(w.part[e]);
    }
  } else {
    struct alignas(2 * kCount) Words {
      std::uint32_t part[kCount / 2];
    };
    const Words w = *reinterpret_cast<const Words*>(from);
    for (int e = 0; e < kCount / 2; ++e) {
      to[2 * e] = widen_low<T>(w.part[e]);
      to[2 * e + 1] = widen_high<T>(w.part[e]);
    }
  }
}

template <int kCount>
ARDLORA_DEVICE void store_floats(const float* from, float* to) {
  if constexpr (kCount == 1) {
    *to = *from;
  } else {
    for (int i = 0; i < kCount; i += 4) {
      Word16 w;
      for (int e = 0; e < 4; ++e) w.part[e] = __float_as_uint(from[i + e]);
      store16(to + i, w);
    }
  }
}

// <w, g>, or the sum of |w g|, of one row.
template <typename T, int kCount, bool kMagnitude>
ARDLORA_DEVICE float row_sum(const T* weight, const T* grad, std::int64_t cols, int lane) {
  float sum = 0.0f;
#pragma unroll 4
  for (std::int64_t c = lane * kCount; c < cols; c += 32 * kCount) {
    float w[kCount], g[kCount];
    load_floats<kCount>(weight + c, w);
    load_floats<kCount>(grad + c, g);
    for (int e = 0; e < kCount; ++e) sum += kMagnitude ? fabsf(w[e] * g[e]) : w[e] * g[e];
  }
  return warp_sum(sum);
}

// Equations E2 to E5 of one row: I = |w g|, Ibar = b1 Ibar + (1 - b1) I, Ubar = b2 Ubar + (1 - b2) |I - Ibar|. Returns
// the sum of Ibar Ubar.
template <typename T, int kCount>
ARDLORA_DEVICE float update_row(const RowBuffers& b, std::int64_t row, const ImportanceStep& p, int lane) {
  const T* weight = as_global(static_cast<const T*>(b.weight)) + row * b.cols;
  const T* grad = as_global(static_cast<const T*>(b.grad)) + row * b.cols;
  float* sensitivity = as_global(b.sensitivity) + row * b.cols;
  float* uncertainty = as_global(b.uncertainty) + row * b.cols;
  float sum = 0.0f;
  for (std::int64_t c = lane * kCount; c < b.cols; c += 32 * kCount) {
    float w[kCount], g[kCount], i[kCount], u[kCount];
    load_floats<kCount>(weight + c, w);
    load_floats<kCount>(grad + c, g);
    load_floats<kCount>(sensitivity + c, i);
    load_floats<kCount>(uncertainty + c, u);
    for (int e = 0; e < kCount; ++e) {
      const float entry = fabsf(w[e] * g[e]);
      i[e] = p.beta1 * i[e] + p.one_minus_beta1 * entry;
      u[e] = p.beta2 * u[e] + p.one_minus_beta2 * fabsf(entry - i[e]);
      sum += i[e] * u[e];
    }
    store_floats<kCount>(i, sensitivity + c);
    store_floats<kCount>(u, uncertainty + c);
  }
  return warp_sum(sum);
}

// Calls f(job, row of the job, row of the table) for this warp's row, with T and the vector width as template
// arguments; `F::kVector<T>` is that width.
template <typename F>
ARDLORA_DEVICE void for_row(const std::int64_t* table, std::int64_t jobs, std::int64_t rows, F&& f) {
  using Pass = std::remove_reference_t<F>;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  if (row >= rows) return;
  const RowJob* all = reinterpret_cast<const RowJob*>(table);
  std::int64_t low = 0;
  for (std::int64_t high = jobs; high - low > 1;) {  // the last job that begins at or before this row
    const std::int64_t middle = (low + high) / 2;
    (all[middle].first_row <= row ? low : high) = middle;
  }
  const RowJob job = all[low];
  const auto run = [&](auto type) {
    using T = decltype(type);
    const std::int64_t own = row - job.first_row;
    if (job.vectors) {
      f.template operator()<T, Pass::template kVector<T>>(job.buffers, own, row);
    } else {
      f.template operator()<T, 1>(job.buffers, own, row);
    }
  };
  if (job.buffers.dtype == DType::kFloat32) return run(float{});
  if (job.buffers.dtype == DType::kBFloat16) return run(BFloat16{});
  run(Float16{});
}

template <bool kMagnitude>
struct SumOfRow {
  template <typename T>
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  float* out;  // [rows]
  template <typename T, int kCount>
  ARDLORA_DEVICE void operator()(const RowBuffers& b, std::int64_t own, std::int64_t row) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const T* weight = as_global(static_cast<const T*>(b.weight)) + own * b.cols;
    const T* grad = as_global(static_cast<const T*>(b.grad)) + own * b.cols;
    const float sum = row_sum<T, kCount, kMagnitude>(weight, grad, b.cols, lane);
    if (lane == 0) out[row] = sum;
  }
};

template <bool kMagnitude>
__global__ void __launch_bounds__(kRowThreads)
    row_sums_kernel(const std::int64_t* __restrict__ table, std::int64_t jobs, std::int64_t rows, float* out) {
  begin_kernel();
  for_row(table, jobs, rows, SumOfRow<kMagnitude>{out});
}

struct UpdateOfRow {
  template <typename T>
  static constexpr int kVector = 4;  // one access of 16 bytes to each mean
  ImportanceStep step;
  template <typename T, int kCount>
  ARDLORA_DEVICE void operator()(const RowBuffers& b, std::int64_t own, std::int64_t row) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float sum = update_row<T, kCount>(b, own, step, lane);
    if (lane == 0) step.score[row] = b.cols > 0 ? sum / static_cast<float>(b.cols) : 0.0f;
  }
};

__global__ void __launch_bounds__(kRowThreads)
    importance_kernel(const std::int64_t* __restrict__ table, std::int64_t jobs, std::int64_t rows,
                      ImportanceStep step) {
  begin_kernel();
  if (*step.finite == 0.0f) return;
  for_row(table, jobs, rows, UpdateOfRow{step});
}

// finite = 1 if all values are, else 0. One block.
__global__ void __launch_bounds__(kFiniteThreads)
    all_finite_kernel(const float* values, std::int64_t count, float* finite) {
  begin_kernel();
  ARDLORA_SHARED(shared);
  float* bad = reinterpret_cast<float*>(shared);  // [warps]
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  float found = 0.0f;
  for (std::int64_t i = thread; i < count; i += kFiniteThreads) {
    if (!(fabsf(values[i]) <= 3.402823466e38f)) found += 1.0f;
  }
  found = warp_sum(found);
  if (thread % 32 == 0) bad[warp] = found;
  __syncthreads();
  if (thread != 0) return;
  for (int w = 1; w < kFiniteThreads / 32; ++w) found += bad[w];
  *finite = found == 0.0f ? 1.0f : 0.0f;
}

}  // namespace ardlora::cuda
