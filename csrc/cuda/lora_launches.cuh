// One call's launches: what each kernel gets, and which share of the workspace.
#pragma once

#include <algorithm>

#include "core/lora_checks.h"
#include "cuda/expand.cuh"
#include "cuda/gate_gradient.cuh"
#include "cuda/gemm_plan.h"
#include "cuda/launcher.h"
#include "cuda/lora_linear.h"
#include "cuda/outer.cuh"
#include "cuda/prepare.cuh"
#include "cuda/row_blocks.cuh"
#include "cuda/shrink.cuh"
#include "cuda/sum_shares.cuh"

namespace ardlora::cuda {

// f(T{}) with the activations' type.
template <typename F>
void for_type(DType dtype, F&& f) {
  if (dtype == DType::kBFloat16) return f(BFloat16{});
  if (dtype == DType::kFloat16) return f(Float16{});
  f(float{});
}

// Of the types that tensor cores take as they are.
template <typename F>
void for_short_type(DType dtype, F&& f) {
  if (dtype == DType::kBFloat16) return f(BFloat16{});
  f(Float16{});
}

inline bool in_chunks(const MatrixView& m, std::int64_t width) {
  const std::int64_t bytes = dtype_size(m.dtype);
  return reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0 && m.row_stride * bytes % 16 == 0 &&
         width * bytes % 16 == 0;
}

inline Activations activations(const MatrixView& x, const Factor& f) {
  return {x.data, x.row_stride, static_cast<std::int32_t>(x.rows), in_chunks(x, f.width)};
}

inline Operand weight(const FactorView& w) {
  return {w.weight.data, w.weight.row_stride, w.weight.dtype == DType::kFloat32, in_chunks(w.weight, w.factor->width)};
}

inline Activations hidden(const MatrixView& h) {
  return {h.data, h.row_stride, static_cast<std::int32_t>(h.rows), in_chunks(h, h.row_stride)};
}

inline bool is_sorted(const UnitTable& table) { return table.kind() == UnitKind::kExperts; }

inline std::int64_t table_floats(std::int64_t records) {
  return records * static_cast<std::int64_t>(sizeof(RowBlock) / sizeof(float));
}

// One call's context: where its launches go and which share of the workspace is left.
class Launches {
 public:
  Launches(const char* op, const LoraParams& p, const DeviceCall& call)
      : op_(op), p_(p), call_(call), guard_(op, call.stream.device) {
    ARDLORA_CHECK(call.table != nullptr && reinterpret_cast<std::uintptr_t>(call.table) % 16 == 0, op,
                  ": table must be at an address divisible by 16");
    ARDLORA_CHECK(reinterpret_cast<std::uintptr_t>(call.workspace) % 16 == 0, op,
                  ": workspace must be at an address divisible by 16");
    const LoraPlans& plans = *call.plans;
    ARDLORA_CHECK(plans.rows == p.x.rows && plans.activations == p.x.dtype && plans.dropout == p.dropout.active(), op,
                  ": plans must be of this call, got those of ", plans.rows, " rows for ", p.x.rows);
    ARDLORA_CHECK(call.workspace_bytes >= plans.workspace, op, ": workspace must have ", plans.workspace,
                  " bytes, got ", call.workspace_bytes);
  }

  // Before all else where rows are sorted by expert: finds the blocks of rows, and for the backward `outer`'s shares.
  void find_rows(const std::int64_t* offsets, bool backward) {
    const UnitTable& t = *p_.table;
    ARDLORA_CHECK(is_sorted(t), op_, ": table must be of experts, got kind ", static_cast<int>(t.kind()));
    ARDLORA_CHECK(offsets != nullptr, op_, ": offsets must not be null");
    RowBlocksParams params{
        offsets, table(kFactorA).segments, static_cast<int>(t.ranks().size()), static_cast<int>(p_.x.rows), {}};
    const auto take_table = [&](RowBlockTable& to, std::int64_t length, unsigned room, int sums, bool of_outer) {
      to = {static_cast<int>(length), records(room), static_cast<int>(room), records(sums), sums};
      if (of_outer && sums == 0) to.sums = to.blocks;  // not null
    };
    const GemmPlan& tile = call_.plans->shrink_a;
    static_assert(kShrinkRows == kExpandRows);
    take_table(params.table[0], kShrinkRows, tile.blocks[0], 0, false);
    unsigned tables = tile.blocks[0] == 0 ? 0 : 1;
    tiles_ = params.table[0];
    for (int factor = 0; backward && tables > 0 && factor < 2; ++factor) {
      const GemmPlan& plan = factor == kFactorA ? call_.plans->outer_a : call_.plans->outer_b;
      take_table(params.table[tables], plan.share, plan.blocks[2], plan.sums, true);
      shares_[factor] = params.table[tables++];
    }
    reserved_ = taken_;
    start(row_blocks_kernel, {dim3{tables, 1, 1}, kRowBlockThreads}, params);
  }

  // Before the `shrink` of one factor and the `expand` of the other, for those whose blocks are wide.
  void prepare(const GemmPlan& of_shrink, const FactorView& w_shrink, const GemmPlan& of_expand,
               const FactorView& w_expand) {
    PrepareParams params{};
    if (of_shrink.wide()) params.factor[0] = prepared(shrunk_, of_shrink, w_shrink, false);
    if (of_expand.wide()) params.factor[1] = prepared(expanded_, of_expand, w_expand, true);
    reserved_ = taken_;
    const dim3 blocks{static_cast<unsigned>(params.factor[0].rows + params.factor[1].rows), 1, 1};
    for_short_type(p_.x.dtype, [&](auto t) { start(prepare_kernel<decltype(t)>, {blocks, kPrepareThreads}, params); });
  }

  void shrink(const GemmPlan& plan, const FactorView& w, int factor, const MatrixView& x, const MatrixView& h,
              const Dropout& dropout) {
    float* const partial = take(plan.partial());
    const float scale = w.scale * dropout.keep_scale;
    const ShrinkParams params{table(factor),
                              tiles_.blocks,
                              static_cast<int>(w.factor->width),
                              activations(x, *w.factor),
                              plan.wide() ? shrunk_ : weight(w),
                              plan.wide() ? nullptr : w.row_scale,
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
    if (plan.wide()) {
      for_short_type(x.dtype, [&](auto t) { start(wide_shrink_kernel<decltype(t)>, plan, params); });
    } else {
      for_type(x.dtype, [&](auto t) { start(shrink_kernel<decltype(t)>, plan, params); });
    }
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
    if (tiles_.blocks != nullptr) {
      sum.out_rows = tiles_.room * tiles_.length;
      sum.sorted = {tiles_.blocks, table(factor).segments, tiles_.length, false};
    }
    add_shares(sum, {});
    taken_ = reserved_;
  }

  void expand(const GemmPlan& plan, const FactorView& w, int factor, const MatrixView& h, const MatrixView& y,
              const Dropout& dropout, const Onto& onto = {}) {
    const auto written = static_cast<std::int64_t>(w.factor->segments.size()) * w.factor->width;
    ARDLORA_CHECK(!onto.nothing || written == y.cols, op_, ": every unit must have a rank where y is not read");
    const ExpandParams params{table(factor),
                              tiles_.blocks,
                              static_cast<int>(w.factor->width),
                              hidden(h),
                              plan.wide() ? expanded_ : weight(w),
                              plan.wide() ? nullptr : w.row_scale,
                              w.scale * dropout.keep_scale,
                              activations(y, *w.factor),
                              onto.nothing,
                              onto.bias,
                              plan.tiles,
                              plan.rank_tile,
                              dropout};
    if (plan.wide()) {
      for_short_type(y.dtype, [&](auto t) { start(wide_expand_kernel<decltype(t)>, plan, params); });
    } else {
      for_type(y.dtype, [&](auto t) { start(expand_kernel<decltype(t)>, plan, params); });
    }
  }

  // The second stage is left to `add_shares`.
  ShareSum outer(const GemmPlan& plan, const FactorView& grad, int factor, const MatrixView& h, const MatrixView& x,
                 const Dropout& dropout) {
    float* const partial = take(plan.partial());
    const OuterParams params = outer_params(plan, grad, factor, h, x, dropout, partial);
    for_type(x.dtype, [&](auto t) { start(outer_kernel<decltype(t)>, plan, params); });
    return outer_sum(plan, grad, factor, x, dropout, partial);
  }

  // dH and dW from one pass over dy; `one_pass` says where.
  void outer_shrink(const GemmPlan& plan, const FactorView& grad, const FactorView& w, int factor, const MatrixView& h,
                    const MatrixView& dy, const MatrixView& dh) {
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
    for_short_type(dy.dtype, [&](auto t) { start(outer_shrink_kernel<decltype(t)>, plan, params); });
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
    add_shares(sum, outer_sum(plan, grad, factor, dy, {}, partial));
    taken_ = reserved_;
  }

  // No launch where every row has its value already.
  void add_shares(ShareSum first, ShareSum second) {
    const auto blocks = [](const ShareSum& s) {
      return s.shares > 0 || s.rows < s.out_rows ? sum_blocks(s) : std::int64_t{0};
    };
    const std::int64_t before = blocks(first), all = before + blocks(second);
    ARDLORA_CHECK(all < (std::int64_t{1} << 31), op_, ": gradients must have less than 2^40 elements");
    second.first_block = static_cast<int>(before);
    start(sum_shares_kernel, {dim3{static_cast<unsigned>(all), 1, 1}, kSumThreads}, SumSharesParams{{first, second}});
  }

  // Rows past the live ones, where sums of sorted rows do not come by.
  void zero_past(ShareSum first, const FactorView& of_first, ShareSum second, const FactorView& of_second) {
    const auto past = [](ShareSum& s, const FactorView& grad) {
      const bool left = s.sorted.blocks != nullptr;
      s.shares = 0;
      s.sorted = {};
      s.rows = static_cast<int>(grad.factor->rows);
      s.out_rows = left ? static_cast<int>(grad.weight.rows) : s.rows;
    };
    past(first, of_first);
    past(second, of_second);
    add_shares(first, second);
  }

  void gate_gradient(const FactorView& grad, const MatrixView& w, const float* gate, float* dgate) {
    const GateGradientParams params{weight(with_weight(grad, w)),
                                    static_cast<float*>(grad.weight.data),
                                    grad.weight.row_stride,
                                    static_cast<int>(grad.factor->width),
                                    gate,
                                    dgate};
    const Grid grid{dim3{static_cast<unsigned>(grad.factor->rows), 1, 1}, kGateThreads, kGateShared};
    for_type(p_.x.dtype, [&](auto t) { start(gate_gradient_kernel<decltype(t)>, grid, params); });
  }

 private:
  PreparedFactor prepared(Operand& as, const GemmPlan& plan, const FactorView& w, bool is_interleaved) {
    const std::int64_t stride = prepared_stride(w.factor->width);
    as = {take(plan.prepared), stride, false, true};
    return {weight(w),
            w.row_scale,
            const_cast<void*>(as.data),
            stride,
            static_cast<int>(w.factor->rows),
            static_cast<int>(w.factor->width),
            is_interleaved};
  }

  OuterParams outer_params(const GemmPlan& plan, const FactorView& grad, int factor, const MatrixView& h,
                           const MatrixView& x, const Dropout& dropout, float* partial) const {
    return {table(factor),
            shares_[factor].blocks,
            static_cast<int>(grad.factor->width),
            hidden(h),
            activations(x, *grad.factor),
            grad.row_scale,
            grad.scale * dropout.keep_scale,
            static_cast<float*>(grad.weight.data),
            grad.weight.row_stride,
            partial,
            plan.partial_stride,
            plan.partial_rows * plan.partial_stride,
            plan.share,
            plan.tiles,
            plan.rank_tile,
            dropout};
  }

  ShareSum outer_sum(const GemmPlan& plan, const FactorView& grad, int factor, const MatrixView& x,
                     const Dropout& dropout, const float* partial) const {
    ShareSum sum{partial,
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
    const RowBlockTable& shares = shares_[factor];
    if (partial == nullptr || shares.blocks == nullptr) return sum;
    const int ranks = static_cast<int>(plan.partial_rows);
    sum.rows = ranks;
    sum.out_rows = shares.sum_room * ranks;
    sum.sorted = {shares.sums, table(factor).segments, ranks, true};
    return sum;
  }

  FactorTable table(int factor) const { return factor_table(call_.table, *p_.table, factor); }

  RowBlock* records(std::int64_t count) { return reinterpret_cast<RowBlock*>(take(table_floats(count))); }

  float* take(std::int64_t floats) {
    float* const at = static_cast<float*>(call_.workspace) + taken_;
    taken_ += floats;
    return floats == 0 ? nullptr : at;
  }

  template <typename Params>
  void start(void (*kernel)(Params), const GemmPlan& plan, const Params& params) {
    const Grid grid{dim3{plan.blocks[0], plan.blocks[1], plan.blocks[2]}, plan.threads,
                    static_cast<std::size_t>(plan.shared)};
    start(kernel, grid, params);
  }

  template <typename Params>
  void start(void (*kernel)(Params), Grid grid, const Params& params) {
    grid.follows = started_;
    if (launch(op_, kernel, grid, call_.stream.handle, params)) started_ = true;
  }

  const char* op_;
  const LoraParams& p_;
  const DeviceCall& call_;
  DeviceGuard guard_;
  bool started_ = false;
  std::int64_t taken_ = 0, reserved_ = 0;  // floats of the workspace
  RowBlockTable tiles_{}, shares_[2]{};    // of rows sorted by expert
  Operand shrunk_{}, expanded_{};          // prepared factors
};

}  // namespace ardlora::cuda
