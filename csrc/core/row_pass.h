// Shrink and expand as one pass over blocks of rows, and what forward and backward share around it.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "core/lora_passes.h"

namespace ardlora {

inline constexpr std::int64_t kRowGrain = 8;  // whole tiles and pairs of rows

// Few ranks take as long as four: the pass over the activations does.
inline double rank_cost(std::int64_t rank) {
  return rank == 0 ? 0.0 : static_cast<double>(std::max<std::int64_t>(rank, 4));
}

// Dropout only zeroes; what makes up for it is part of the factor's scale.
inline FactorView scaled(FactorView w, float by) {
  w.scale *= by;
  return w;
}

// Rows of a block that passes through shrink and expand together: what it touches stays in the L2 cache.
inline std::int64_t block_rows(std::int64_t row_bytes) {
  constexpr std::int64_t kBytes = 256 * 1024, kMost = 64;
  return std::clamp(kBytes / std::max<std::int64_t>(row_bytes, 1) / kRowGrain * kRowGrain, kRowGrain, kMost);
}

// From the gradient of the factor with gates left out: dg_i = <dW_i, W_i>, then dW_i *= g_i. Right at g_i = 0 too.
inline void gate_gradient(const FactorView& grad, const MatrixView& weight, const float* gate, float* dgate,
                          cpu::Range rows) {
  const cpu::RowDotFn dot = cpu::active().row_dot[static_cast<int>(weight.dtype)][static_cast<int>(DType::kFloat32)];
  const std::int64_t width = grad.factor->width, row_bytes = weight.row_stride * dtype_size(weight.dtype);
  for (std::int64_t i = rows.begin; i < rows.end; ++i) {
    float* dw = static_cast<float*>(grad.weight.data) + i * grad.weight.row_stride;
    dgate[i] = dot(static_cast<const char*>(weight.data) + i * row_bytes, dw, width);
    for (std::int64_t n = 0; n < width; ++n) dw[n] *= gate[i];
  }
}

inline void fill_keep_bits(const Dropout& dropout, const KeepBits& keep, const MatrixView& x, std::int64_t begin,
                           std::int64_t end) {
  if (keep.words == nullptr) return;
  cpu::active().keep_bits(dropout, begin, end, x.cols, keep.words + begin * keep.stride, keep.stride);
}

// y += expand(shrink(x)), rows in blocks; h keeps the result of shrink. `out` null: shrink alone.
class RowPass {
 public:
  RowPass(const FactorView& in, const MatrixView& x, const FactorView* out, const MatrixView& y, const MatrixView& h,
          bool masked_in, int threads, cpu::Arena::Use& arena)
      : h_(h), rows_(x.rows), shrink_(in, x, masked_in, threads, arena) {
    if (out != nullptr) expand_.emplace(*out, y, threads, arena);
    block_ = block_rows(shrink_.row_bytes() + (expand_ ? expand_->row_bytes() : 0));
    for (int t = 0; t < threads; ++t) {
      scratch_.push_back(
          {shrink_.take_scratch(block_, arena), expand_ ? expand_->take_scratch(block_, arena) : nullptr});
    }
  }
  void pack(const cpu::Team& team) const {
    shrink_.pack(team);
    if (expand_) expand_->pack(team);
  }
  // before(begin, end) and after(begin, end) surround each block.
  template <typename Before, typename After>
  void run(const cpu::Team& team, const KeepBits& in, const KeepBits& out, Before&& before, After&& after) const {
    const auto [x_rows, hidden] = scratch_[static_cast<std::size_t>(team.id)];
    const cpu::Range part = team.share(rows_, kRowGrain);
    for (std::int64_t m = part.begin; m < part.end; m += block_) {
      const std::int64_t end = std::min(part.end, m + block_);
      before(m, end);
      shrink_.run(team, m, end, in, h_, x_rows);
      if (expand_) expand_->run(team, m, end, out, h_, hidden);
      after(m, end);
    }
  }

 private:
  struct Scratch {
    void* x_rows;
    void* hidden;
  };
  MatrixView h_;
  std::int64_t rows_;
  ShrinkPass shrink_;
  std::optional<ExpandPass> expand_;
  std::int64_t block_;
  std::vector<Scratch> scratch_;
};

}  // namespace ardlora
