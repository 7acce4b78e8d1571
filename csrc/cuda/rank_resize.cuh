// Rows of many buffers move in one launch. A thread owns one word of every row of a buffer, a column that no other
// thread touches, and walks the buffer's steps in order: nothing needs a barrier or scratch memory, a cycle's row waits
// in a register.
#pragma once

#include <cstdint>

#include "cuda/ptx.h"
#include "cuda/resize_table.h"

namespace ardlora::cuda {

template <typename Word>
ARDLORA_DEVICE void move_column(const ResizeJob& job, const RowStep* steps, std::int64_t column) {
  const std::int64_t stride = job.row_bytes / static_cast<std::int64_t>(sizeof(Word));
  if (column >= stride) return;
  const Word* src = reinterpret_cast<const Word*>(job.src) + column;
  Word* dst = reinterpret_cast<Word*>(job.dst) + column;
  Word held{};
  for (std::int64_t i = 0; i < job.steps; ++i) {
    const RowStep step = steps[job.first_step + i];
    Word value = held;
    if (step.from == kZeroRow) value = Word{};
    if (step.from >= 0) value = *as_global(src + step.from * stride);
    if (step.to == kHeldRow) {
      held = value;
    } else {
      *as_global(dst + step.to * stride) = value;
    }
  }
}

__global__ void __launch_bounds__(kResizeThreads)
    rank_resize_kernel(const std::int64_t* __restrict__ table, std::int64_t jobs) {
  begin_kernel();
  const ResizeJob* all = reinterpret_cast<const ResizeJob*>(table);
  const RowStep* steps = reinterpret_cast<const RowStep*>(all + jobs);
  const std::int64_t block = blockIdx.x;
  std::int64_t low = 0;
  for (std::int64_t high = jobs; high - low > 1;) {  // the last job that begins at or before this block
    const std::int64_t middle = (low + high) / 2;
    (all[middle].first_block <= block ? low : high) = middle;
  }
  const ResizeJob job = all[low];
  const std::int64_t column = (block - job.first_block) * kResizeThreads + threadIdx.x;
  if (job.word == 16) return move_column<Word16>(job, steps, column);
  if (job.word == 4) return move_column<std::uint32_t>(job, steps, column);
  if (job.word == 2) return move_column<std::uint16_t>(job, steps, column);
  move_column<std::uint8_t>(job, steps, column);
}

}  // namespace ardlora::cuda
