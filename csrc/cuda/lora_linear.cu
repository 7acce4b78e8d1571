// Launchers of the LoRA linear: shrink then expand, as on the CPU (core/lora_linear.cpp), and the gradients.
#include "cuda/lora_linear.h"

#include <algorithm>

#include "core/lora_checks.h"
#include "cuda/expand.cuh"
#include "cuda/gate_gradient.cuh"
#include "cuda/gemm_plan.h"
#include "cuda/launcher.h"
#include "cuda/outer.cuh"
#include "cuda/shrink.cuh"
#include "cuda/sum_shares.cuh"

namespace ardlora::cuda {
namespace {

// f(T{}) with the activations' type.
template <typename F>
void for_type(DType dtype, F&& f) {
  if (dtype == DType::kBFloat16) return f(BFloat16{});
  if (dtype == DType::kFloat16) return f(Float16{});
  f(float{});
}

bool in_chunks(const MatrixView& m, std::int64_t width) {
  const std::int64_t bytes = dtype_size(m.dtype);
  return reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0 && m.row_stride * bytes % 16 == 0 &&
         width * bytes % 16 == 0;
}

Activations activations(const MatrixView& x, const Factor& f) {
  return {x.data, x.row_stride, static_cast<std::int32_t>(x.rows), in_chunks(x, f.width)};
}

Operand weight(const FactorView& w) {
  return {w.weight.data, w.weight.row_stride, w.weight.dtype == DType::kFloat32, in_chunks(w.weight, w.factor->width)};
}

Activations hidden(const MatrixView& h) {
  return {h.data, h.row_stride, static_cast<std::int32_t>(h.rows), in_chunks(h, h.row_stride)};
}

// Where each unit begins at a chunk, too.
Activations hidden(const MatrixView& h, const Factor& f) {
  Activations a = hidden(h);
  for (const Segment& s : f.segments) a.vector = a.vector && s.h_begin * dtype_size(h.dtype) % 16 == 0;
  return a;
}

// One call's context: where its launches go and which share of the workspace is left.
class Launches {
 public:
  Launches(const char* op, const LoraParams& p, const DeviceCall& call)
      : op_(op), p_(p), call_(call), guard_(op, call.stream.device), device_(multiprocessors(call.stream.device)) {
    ARDLORA_CHECK(call.table != nullptr && reinterpret_cast<std::uintptr_t>(call.table) % 16 == 0, op,
                  ": table must be at an address divisible by 16");
    ARDLORA_CHECK(reinterpret_cast<std::uintptr_t>(call.workspace) % 16 == 0, op,
                  ": workspace must be at an address divisible by 16");
    const std::int64_t needed = lora_workspace(*p.table, p.x.rows, p.x.dtype, call.stream.device);
    ARDLORA_CHECK(call.workspace_bytes >= needed, op, ": workspace must have ", needed, " bytes, got ",
                  call.workspace_bytes);
  }

  void shrink(const FactorView& w, int factor, const MatrixView& x, const MatrixView& h, const Dropout& dropout) {
    const GemmPlan plan = this->plan(Gemm::kShrink, w, p_.table->hidden(), x, dropout);
    float* const partial = take(plan.workspace());
    const float scale = w.scale * dropout.keep_scale;
    const ShrinkParams params{table(factor),
                              static_cast<int>(w.factor->width),
                              activations(x, *w.factor),
                              weight(w),
                              w.row_scale,
                              scale,
                              h.data,
                              h.row_stride,
                              static_cast<int>(p_.table->hidden()),
                              partial,
                              plan.partial_stride,
                              plan.share,
                              plan.tiles,
                              plan.rank_tile,
                              dropout};
    for_type(x.dtype, [&](auto t) { start(shrink_kernel<decltype(t)>, plan, params); });
    if (plan.shares == 1) return;
    // Fours of columns, where `shrink` has written what rounds the last group up.
    std::int64_t columns = p_.table->hidden();
    if (w.factor->segments.back().h_begin % 8 == 0) columns = std::min((columns + 3) / 4 * 4, h.cols);
    ShareSum sum{partial,
                 plan.partial_stride,
                 plan.shares,
                 static_cast<int>(x.rows),
                 static_cast<int>(columns),
                 scale,
                 nullptr,
                 h.data,
                 h.dtype,
                 h.row_stride,
                 static_cast<int>(x.rows),
                 0};
    add_shares(sum, {});
    taken_ = 0;
  }

  void expand(const FactorView& w, int factor, const MatrixView& h, const MatrixView& y, const Dropout& dropout) {
    const GemmPlan plan = this->plan(Gemm::kExpand, w, h.cols, y, dropout);
    const ExpandParams params{table(factor),
                              static_cast<int>(w.factor->width),
                              hidden(h, *w.factor),
                              weight(w),
                              w.row_scale,
                              w.scale * dropout.keep_scale,
                              activations(y, *w.factor),
                              plan.tiles,
                              plan.rank_tile,
                              dropout};
    for_type(y.dtype, [&](auto t) { start(expand_kernel<decltype(t)>, plan, params); });
  }

  // The second stage is left to `add_shares`.
  ShareSum outer(const FactorView& grad, int factor, const MatrixView& h, const MatrixView& x, const Dropout& dropout) {
    const GemmPlan plan = this->plan(Gemm::kOuter, grad, h.cols, x, dropout);
    float* const partial = take(plan.partial());
    const OuterParams params = outer_params(plan, grad, factor, h, x, dropout, partial);
    for_type(x.dtype, [&](auto t) { start(outer_kernel<decltype(t)>, plan, params); });
    return outer_sum(plan, grad, x, dropout, partial);
  }

  // dH and dW from one pass over dy; `one_pass` says where.
  void outer_shrink(const FactorView& grad, const FactorView& w, int factor, const MatrixView& h, const MatrixView& dy,
                    const MatrixView& dh) {
    const GemmPlan plan = this->plan(Gemm::kOuterShrink, grad, p_.table->hidden(), dy, {});
    float* const partial = take(plan.partial());
    float* const parts = take(plan.hidden_partial());
    const bool divided = parts != nullptr;
    const OuterShrinkParams params{outer_params(plan, grad, factor, h, dy, {}, partial),
                                   weight(w),
                                   w.row_scale,
                                   w.scale,
                                   dh.data,
                                   dh.row_stride,
                                   parts,
                                   plan.hidden_stride};
    if (dy.dtype == DType::kBFloat16) {
      start(outer_shrink_kernel<BFloat16>, plan, params);
    } else {
      start(outer_shrink_kernel<Float16>, plan, params);
    }
    const int rows = static_cast<int>(dy.rows);
    const ShareSum sum{parts,
                       plan.hidden_stride,
                       divided ? plan.tiles : 0,
                       rows,
                       static_cast<int>(p_.table->hidden()),
                       w.scale,
                       nullptr,
                       dh.data,
                       dh.dtype,
                       dh.row_stride,
                       rows,
                       0};
    add_shares(sum, outer_sum(plan, grad, dy, {}, partial));
    taken_ = 0;
  }

  // No launch where every row has its value already.
  void add_shares(ShareSum first, ShareSum second) {
    const auto blocks = [](const ShareSum& s) {
      return s.shares > 0 || s.rows < s.out_rows ? sum_blocks(s) : std::int64_t{0};
    };
    const std::int64_t before = blocks(first), all = before + blocks(second);
    ARDLORA_CHECK(all < (std::int64_t{1} << 31), op_, ": gradients must have less than 2^40 elements");
    second.first_block = static_cast<int>(before);
    launch(op_, sum_shares_kernel, {dim3{static_cast<unsigned>(all), 1, 1}, kSumThreads, 0}, call_.stream.handle,
           SumSharesParams{{first, second}});
  }

  void gate_gradient(const FactorView& grad, const MatrixView& w, const float* gate, float* dgate) {
    const GateGradientParams params{weight(with_weight(grad, w)),
                                    static_cast<float*>(grad.weight.data),
                                    grad.weight.row_stride,
                                    static_cast<int>(grad.factor->width),
                                    gate,
                                    dgate};
    const Grid grid{dim3{static_cast<unsigned>(grad.factor->rows), 1, 1}, kGateThreads, kGateShared};
    for_type(p_.x.dtype,
             [&](auto t) { launch(op_, gate_gradient_kernel<decltype(t)>, grid, call_.stream.handle, params); });
  }

 private:
  OuterParams outer_params(const GemmPlan& plan, const FactorView& grad, int factor, const MatrixView& h,
                           const MatrixView& x, const Dropout& dropout, float* partial) const {
    const bool divided = partial != nullptr;
    return {table(factor),
            static_cast<int>(grad.factor->width),
            hidden(h),
            activations(x, *grad.factor),
            grad.row_scale,
            grad.scale * dropout.keep_scale,
            divided ? partial : static_cast<float*>(grad.weight.data),
            divided ? plan.partial_stride : grad.weight.row_stride,
            plan.partial_rows * plan.partial_stride,
            divided,
            plan.share,
            plan.tiles,
            plan.rank_tile,
            dropout};
  }

  static ShareSum outer_sum(const GemmPlan& plan, const FactorView& grad, const MatrixView& x, const Dropout& dropout,
                            const float* partial) {
    return {partial,
            plan.partial_stride,
            partial != nullptr ? plan.shares : 0,
            x.rows == 0 ? 0 : static_cast<int>(grad.factor->rows),
            static_cast<int>(grad.factor->width),
            grad.scale * dropout.keep_scale,
            grad.row_scale,
            grad.weight.data,
            DType::kFloat32,
            grad.weight.row_stride,
            static_cast<int>(grad.weight.rows),
            0};
  }

  FactorTable table(int factor) const { return factor_table(call_.table, *p_.table, factor); }

  GemmPlan plan(Gemm kind, const FactorView& w, std::int64_t columns, const MatrixView& x, const Dropout& d) const {
    return plan_gemm(kind, *w.factor, columns, x.rows, x.dtype, d.active(), device_);
  }

  float* take(std::int64_t floats) {
    float* const at = static_cast<float*>(call_.workspace) + taken_;
    taken_ += floats;
    return floats == 0 ? nullptr : at;
  }

  template <typename Params>
  void start(void (*kernel)(Params), const GemmPlan& plan, const Params& params) const {
    const Grid grid{dim3{plan.blocks[0], plan.blocks[1], plan.blocks[2]}, plan.threads,
                    static_cast<std::size_t>(plan.shared)};
    launch(op_, kernel, grid, call_.stream.handle, params);
  }

  const char* op_;
  const LoraParams& p_;
  const DeviceCall& call_;
  DeviceGuard guard_;
  Multiprocessors device_;
  std::int64_t taken_ = 0;
};

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

std::int64_t lora_workspace(const UnitTable& table, std::int64_t rows, DType activations, int device) {
  const Multiprocessors processors = multiprocessors(device);
  const auto floats = [&](Gemm kind, const Factor& f) {
    return plan_gemm(kind, f, table.hidden(), rows, activations, false, processors).workspace();
  };
  const std::int64_t forward = floats(Gemm::kShrink, table.a()), outer_a = floats(Gemm::kOuter, table.a());
  if (one_pass(table.b(), table.hidden(), rows, activations)) {
    return 4 * std::max({forward, outer_a, floats(Gemm::kOuterShrink, table.b())});
  }
  return 4 * std::max({forward, floats(Gemm::kShrink, table.b()), outer_a + floats(Gemm::kOuter, table.b())});
}

void lora_forward(const LoraParams& p, const MatrixView& y, const DeviceCall& call) {
  check_forward(p, y, p.x.dtype);
  Launches go("lora_forward", p, call);
  go.shrink(factor_a(p), kFactorA, p.x, p.h, p.dropout);
  go.expand(factor_b(p), kFactorB, p.h, y, {});
}

void lora_backward(const LoraParams& p, const MatrixView& dy, const MatrixView& dh, const MatrixView& dx,
                   const MatrixView& dA, const MatrixView& dB, float* dgate, const DeviceCall& call) {
  check_backward(p, dy, dh, dx, dA, dB, dgate, p.x.dtype);
  Launches go("lora_backward", p, call);
  const FactorView a = factor_a(p), b = factor_b(p);
  FactorView grad_a = with_weight(a, dA), grad_b = with_weight(b, dB);
  FactorView& gated = p.table->gate_on_a() ? grad_a : grad_b;
  if (dgate != nullptr) gated.row_scale = nullptr;
  ShareSum sum_b{};
  const bool at_once = one_pass(*b.factor, p.table->hidden(), dy.rows, dy.dtype);
  if (at_once) {
    go.outer_shrink(grad_b, b, kFactorB, p.h, dy, dh);
  } else {
    go.shrink(b, kFactorB, dy, dh, {});
    sum_b = go.outer(grad_b, kFactorB, p.h, dy, {});
  }
  if (dx.data != nullptr) go.expand(a, kFactorA, dh, dx, p.dropout);
  go.add_shares(sum_b, go.outer(grad_a, kFactorA, dh, p.x, p.dropout));
  if (dgate != nullptr) go.gate_gradient(gated, p.table->gate_on_a() ? p.lora_A : p.lora_B, p.gate, dgate);
}

}  // namespace ardlora::cuda
