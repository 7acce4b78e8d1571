// Launchers of the LoRA linear: shrink then expand, as on the CPU (core/lora_linear.cpp), and the gradients.
#include "cuda/lora_linear.h"

#include <algorithm>

#include "core/lora_checks.h"
#include "cuda/lora_launches.cuh"

namespace ardlora::cuda {
namespace {

// Of all tables of rows sorted by expert.
std::int64_t row_block_floats(const GemmPlan& tile, const GemmPlan& outer_a, const GemmPlan& outer_b) {
  return table_floats(static_cast<std::int64_t>(tile.blocks[0]) + outer_a.blocks[2] + outer_a.sums + outer_b.blocks[2] +
                      outer_b.sums);
}

}  // namespace

#ifdef __CUDACC__
Multiprocessors multiprocessors(int device) {
  Multiprocessors m{};
  const auto get = [&](int& value, cudaDeviceAttr what) {
    check("multiprocessors", cudaDeviceGetAttribute(&value, what, device));
  };
  get(m.count, cudaDevAttrMultiProcessorCount);
  get(m.shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return m;
}
#else
Multiprocessors multiprocessors(int) { return {simt::multiprocessors, 164 * 1024}; }
#endif

LoraPlans plan_lora(const UnitTable& table, std::int64_t rows, DType activations, bool dropout, int device) {
  const Multiprocessors processors = multiprocessors(device);
  const auto plan = [&](Gemm kind, const Factor& f, bool drops = false) {
    return plan_gemm(kind, f, table.hidden(), rows, activations, drops, processors, is_sorted(table));
  };
  const Factor &a = table.a(), &b = table.b();
  const bool at_once = !is_sorted(table) && one_pass(b, table.hidden(), rows, activations);
  LoraPlans p{rows,
              activations,
              dropout,
              at_once,
              plan(Gemm::kShrink, a),
              plan(Gemm::kExpand, b),
              plan(Gemm::kShrink, b),
              plan(at_once ? Gemm::kOuterShrink : Gemm::kOuter, b),
              plan(Gemm::kExpand, a, dropout),
              plan(Gemm::kOuter, a),
              0};
  const std::int64_t forward = p.shrink_a.workspace() + p.expand_b.workspace(), outer_a = p.outer_a.workspace();
  const std::int64_t of_b = p.outer_b.workspace(), sums = at_once ? std::max(outer_a, of_b) : outer_a + of_b;
  const std::int64_t backward = p.shrink_b.prepared + p.expand_a.prepared + std::max(sums, p.shrink_b.partial());
  p.workspace = 4 * std::max(forward, backward);
  if (is_sorted(table)) p.workspace += 4 * row_block_floats(p.shrink_a, p.outer_a, p.outer_b);
  return p;
}

void lora_forward(const LoraParams& p, const MatrixView& y, const DeviceCall& call, const Onto& onto) {
  check_ungrouped(*p.table, "lora_forward");
  check_forward(p, y, p.x.dtype);
  Launches go("lora_forward", p, call);
  go.prepare(call.plans->shrink_a, factor_a(p), call.plans->expand_b, factor_b(p));
  go.shrink(call.plans->shrink_a, factor_a(p), kFactorA, p.x, p.h, p.dropout);
  go.expand(call.plans->expand_b, factor_b(p), kFactorB, p.h, y, {}, onto);
}

void lora_backward(const LoraParams& p, const MatrixView& dy, const MatrixView& dh, const MatrixView& dx,
                   const MatrixView& dA, const MatrixView& dB, float* dgate, const DeviceCall& call, const Onto& onto) {
  check_ungrouped(*p.table, "lora_backward");
  check_backward(p, dy, dh, dx, dA, dB, dgate, p.x.dtype);
  Launches go("lora_backward", p, call);
  const LoraPlans& plans = *call.plans;
  const FactorView a = factor_a(p), b = factor_b(p);
  FactorView grad_a = with_weight(a, dA), grad_b = with_weight(b, dB);
  FactorView& gated = p.table->gate_on_a() ? grad_a : grad_b;
  if (dgate != nullptr) gated.row_scale = nullptr;
  go.prepare(plans.shrink_b, b, dx.data != nullptr ? plans.expand_a : GemmPlan{}, a);
  ShareSum sum_b{};
  if (plans.at_once) {
    go.outer_shrink(plans.outer_b, grad_b, b, kFactorB, p.h, dy, dh);
  } else {
    go.shrink(plans.shrink_b, b, kFactorB, dy, dh, {});
    sum_b = go.outer(plans.outer_b, grad_b, kFactorB, p.h, dy, {});
  }
  if (dx.data != nullptr) go.expand(plans.expand_a, a, kFactorA, dh, dx, p.dropout, {onto.nothing});
  go.add_shares(sum_b, go.outer(plans.outer_a, grad_a, kFactorA, dh, p.x, p.dropout));
  if (dgate != nullptr) go.gate_gradient(gated, p.table->gate_on_a() ? p.lora_A : p.lora_B, p.gate, dgate);
}

void lora_grouped_forward(const GroupedParams& p, const MatrixView& y, const DeviceCall& call) {
  check_forward(p.lora, y, p.lora.x.dtype);
  Launches go("lora_grouped_forward", p.lora, call);
  go.find_rows(p.offsets, false);
  go.prepare(call.plans->shrink_a, factor_a(p.lora), call.plans->expand_b, factor_b(p.lora));
  go.shrink(call.plans->shrink_a, factor_a(p.lora), kFactorA, p.lora.x, p.lora.h, p.lora.dropout);
  go.expand(call.plans->expand_b, factor_b(p.lora), kFactorB, p.lora.h, y, {});
}

void lora_grouped_backward(const GroupedParams& p, const MatrixView& dy, const MatrixView& dh, const MatrixView& dx,
                           const MatrixView& dA, const MatrixView& dB, float* dgate, const DeviceCall& call) {
  const LoraParams& lora = p.lora;
  check_backward(lora, dy, dh, dx, dA, dB, dgate, lora.x.dtype);
  Launches go("lora_grouped_backward", lora, call);
  const LoraPlans& plans = *call.plans;
  go.find_rows(p.offsets, true);
  const FactorView a = factor_a(lora), b = factor_b(lora), grad_a = with_weight(a, dA);
  FactorView grad_b = with_weight(b, dB);
  if (dgate != nullptr) grad_b.row_scale = nullptr;  // experts' gates are on B
  go.prepare(plans.shrink_b, b, dx.data != nullptr ? plans.expand_a : GemmPlan{}, a);
  go.shrink(plans.shrink_b, b, kFactorB, dy, dh, {});
  const ShareSum sum_b = go.outer(plans.outer_b, grad_b, kFactorB, lora.h, dy, {});
  if (dx.data != nullptr) go.expand(plans.expand_a, a, kFactorA, dh, dx, lora.dropout);
  const ShareSum sum_a = go.outer(plans.outer_a, grad_a, kFactorA, dh, lora.x, lora.dropout);
  go.add_shares(sum_b, sum_a);
  go.zero_past(sum_b, grad_b, sum_a, grad_a);
  if (dgate != nullptr) go.gate_gradient(grad_b, lora.lora_B, lora.gate, dgate);
}

}  // namespace ardlora::cuda
