#include "ardlora/lora_linear.h"

#include <algorithm>
#include <vector>

#include "core/lora_checks.h"
#include "core/row_pass.h"

namespace ardlora {
namespace {

using cpu::Arena;
using cpu::Team;

double factor_flops(const Factor& f, std::int64_t rows) {
  double ranks = 0.0;
  for (const Segment& s : f.segments) ranks += rank_cost(s.rank);
  return 2.0 * static_cast<double>(rows) * ranks * static_cast<double>(f.width);
}

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
  check_ungrouped(*p.table, "lora_forward");
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
  check_ungrouped(*p.table, "lora_backward");
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
