#include "ardlora/lora_linear.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "core/lora_checks.h"
#include "core/lora_passes.h"

namespace ardlora {
namespace {

using cpu::Arena;
using cpu::Team;

constexpr std::int64_t kRowGrain = 8;  // whole tiles and pairs of rows

// Few ranks take as long as four: the pass over the activations does.
double factor_flops(const Factor& f, std::int64_t rows) {
  std::int64_t ranks = 0;
  for (const Segment& s : f.segments) ranks += s.rank == 0 ? 0 : std::max<std::int64_t>(s.rank, 4);
  return 2.0 * static_cast<double>(rows) * static_cast<double>(ranks) * static_cast<double>(f.width);
}

// Dropout only zeroes; what makes up for it is part of the factor's scale.
FactorView scaled(FactorView w, float by) {
  w.scale *= by;
  return w;
}

// Rows of a block that passes through shrink and expand together: what it touches stays in the L2 cache.
std::int64_t block_rows(std::int64_t row_bytes) {
  constexpr std::int64_t kBytes = 256 * 1024, kMost = 64;
  return std::clamp(kBytes / std::max<std::int64_t>(row_bytes, 1) / kRowGrain * kRowGrain, kRowGrain, kMost);
}

// From the gradient of the factor with gates left out: dg_i = <dW_i, W_i>, then dW_i *= g_i. Right at g_i = 0 too.
void gate_gradient(const FactorView& grad, const MatrixView& weight, const float* gate, float* dgate, cpu::Range rows) {
  const cpu::RowDotFn dot = cpu::active().row_dot[static_cast<int>(weight.dtype)][static_cast<int>(DType::kFloat32)];
  const std::int64_t width = grad.factor->width, row_bytes = weight.row_stride * dtype_size(weight.dtype);
  for (std::int64_t i = rows.begin; i < rows.end; ++i) {
    float* dw = static_cast<float*>(grad.weight.data) + i * grad.weight.row_stride;
    dgate[i] = dot(static_cast<const char*>(weight.data) + i * row_bytes, dw, width);
    for (std::int64_t n = 0; n < width; ++n) dw[n] *= gate[i];
  }
}

void fill_keep_bits(const Dropout& dropout, const KeepBits& keep, const MatrixView& x, std::int64_t begin,
                    std::int64_t end) {
  if (keep.words == nullptr) return;
  cpu::active().keep_bits(dropout, begin, end, x.cols, keep.words + begin * keep.stride, keep.stride);
}

// y += expand(shrink(x)), rows in blocks; h keeps the result of shrink. `out` null: shrink alone.
class RowPass {
 public:
  RowPass(const FactorView& in, const MatrixView& x, const FactorView* out, const MatrixView& y, const MatrixView& h,
          bool masked_in, int threads, Arena::Use& arena)
      : h_(h), rows_(x.rows), shrink_(in, x, masked_in, threads, arena) {
    if (out != nullptr) expand_.emplace(*out, y, threads, arena);
    block_ = block_rows(shrink_.row_bytes() + (expand_ ? expand_->row_bytes() : 0));
    for (int t = 0; t < threads; ++t) {
      scratch_.push_back(
          {shrink_.take_scratch(block_, arena), expand_ ? expand_->take_scratch(block_, arena) : nullptr});
    }
  }
  void pack(const Team& team) const {
    shrink_.pack(team);
    if (expand_) expand_->pack(team);
  }
  // before(begin, end) and after(begin, end) surround each block.
  template <typename Before, typename After>
  void run(const Team& team, const KeepBits& in, const KeepBits& out, Before&& before, After&& after) const {
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

}  // namespace

void shrink(const FactorView& w, const MatrixView& x, const MatrixView& h, int threads) {
  check_factor(w, "shrink", "weight");
  check_activations(w, x, "shrink", "x");
  check_hidden(h, w, x.rows, DType::kFloat32, "shrink");
  Arena::Use arena;
  const int used = cpu::useful_threads(threads, factor_flops(*w.factor, x.rows));
  const RowPass rows(w, x, nullptr, {}, h, false, used, arena);
  cpu::parallel_region(used, [&](const Team& team) {
    rows.pack(team);
    team.barrier();
    rows.run(team, {}, {}, [](auto...) {}, [](auto...) {});
  });
}

void expand(const FactorView& w, const MatrixView& h, const MatrixView& y, int threads) {
  check_factor(w, "expand", "weight");
  check_activations(w, y, "expand", "y");
  check_hidden(h, w, y.rows, DType::kFloat32, "expand");
  Arena::Use arena;
  const int used = cpu::useful_threads(threads, factor_flops(*w.factor, y.rows));
  const ExpandPass pass(w, y, used, arena);
  const std::int64_t block = block_rows(pass.row_bytes());
  std::vector<void*> scratch;
  for (int t = 0; t < used; ++t) scratch.push_back(pass.take_scratch(block, arena));
  cpu::parallel_region(used, [&](const Team& team) {
    pass.pack(team);
    team.barrier();
    const cpu::Range part = team.share(y.rows, kRowGrain);
    for (std::int64_t m = part.begin; m < part.end; m += block) {
      pass.run(team, m, std::min(part.end, m + block), {}, h, scratch[static_cast<std::size_t>(team.id)]);
    }
  });
}

void outer(const FactorView& w, const MatrixView& h, const MatrixView& x, int threads) {
  check_gradient(w, "outer", "weight");
  check_view(x, w.factor->features, "outer", "x");
  check_hidden(h, w, x.rows, DType::kFloat32, "outer");
  Arena::Use arena;
  const OuterPass pass(w, h, x, arena);
  const int used = cpu::useful_threads(threads, factor_flops(*w.factor, x.rows));
  cpu::parallel_region(used, [&](const Team& team) {
    const cpu::Range part = team.share(x.rows, kRowGrain);
    pass.pack(part.begin, part.end);
    team.barrier();
    pass.run(team, {}, 0.0, pass.work());
  });
}

void lora_forward(const LoraParams& p, const MatrixView& y) {
  check_forward(p, y, DType::kFloat32);
  const bool masked = p.dropout.active();
  const FactorView a = scaled(factor_a(p), masked ? p.dropout.keep_scale : 1.0f), b = factor_b(p);
  Arena::Use arena;
  const std::int64_t rows = p.x.rows;
  const int used = cpu::useful_threads(p.threads, factor_flops(*a.factor, rows) + factor_flops(*b.factor, rows));
  const RowPass pass(a, p.x, &b, y, p.h, masked, used, arena);
  const KeepBits keep = take_keep_bits(p.dropout, rows, p.x.cols, arena);
  cpu::parallel_region(used, [&](const Team& team) {
    pass.pack(team);
    team.barrier();
    pass.run(
        team, keep, {}, [&](auto begin, auto end) { fill_keep_bits(p.dropout, keep, p.x, begin, end); },
        [](auto...) {});
  });
}

void lora_backward(const LoraParams& p, const MatrixView& dy, const MatrixView& dh, const MatrixView& dx,
                   const MatrixView& dA, const MatrixView& dB, float* dgate) {
  check_backward(p, dy, dh, dx, dA, dB, dgate, DType::kFloat32);
  const FactorView a = scaled(factor_a(p), p.dropout.active() ? p.dropout.keep_scale : 1.0f), b = factor_b(p);
  FactorView grad_a = with_weight(a, dA), grad_b = with_weight(b, dB);
  const bool on_a = p.table->gate_on_a(), has_dx = dx.data != nullptr;
  FactorView& gated = on_a ? grad_a : grad_b;
  if (dgate != nullptr) gated.row_scale = nullptr;

  Arena::Use arena;
  const std::int64_t rows = dy.rows;
  const int used =
      cpu::useful_threads(p.threads, 2.0 * (factor_flops(*a.factor, rows) + factor_flops(*b.factor, rows)));
  const RowPass pass(b, dy, has_dx ? &a : nullptr, dx, dh, false, used, arena);
  const OuterPass outer_b(grad_b, p.h, dy, arena), outer_a(grad_a, dh, p.x, arena);
  const KeepBits keep = take_keep_bits(p.dropout, rows, p.x.cols, arena);
  const double work = outer_a.work() + outer_b.work();
  cpu::parallel_region(used, [&](const Team& team) {
    pass.pack(team);
    team.barrier();
    pass.run(
        team, {}, keep, [&](auto begin, auto end) { fill_keep_bits(p.dropout, keep, p.x, begin, end); },
        [&](auto begin, auto end) {
          outer_b.pack(begin, end);
          outer_a.pack(begin, end);
        });
    team.barrier();
    outer_b.run(team, {}, 0.0, work);
    outer_a.run(team, keep, outer_b.work(), work);
    if (dgate == nullptr) return;
    team.barrier();
    const MatrixView& weight = on_a ? p.lora_A : p.lora_B;
    gate_gradient(gated, weight, p.gate, dgate, team.share(gated.factor->rows, 1));
  });
}

}  // namespace ardlora
