#include "ardlora/lora_grouped.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "core/lora_checks.h"
#include "core/row_pass.h"

namespace ardlora {
namespace {

using cpu::Arena;
using cpu::Team;

MatrixView rows_of(MatrixView m, std::int64_t begin, std::int64_t end) {
  if (m.data == nullptr) return m;
  m.data = static_cast<char*>(m.data) + begin * m.row_stride * dtype_size(m.dtype);
  m.rows = end - begin;
  return m;
}

// One expert as a matrix of its own: its rows of the activations, of the factors, of the gates and of H.
struct Expert {
  std::int64_t begin, rows, first, rank;  // of the activations, and of the factors
  Factor a, b;

  MatrixView activations(const MatrixView& m) const { return rows_of(m, begin, begin + rows); }
  MatrixView hidden(const MatrixView& h) const {
    MatrixView own = activations(h);
    own.cols = rank;
    return own;
  }
  FactorView factor(const Factor& f, FactorView w) const {
    w.factor = &f;
    w.weight = rows_of(w.weight, first, first + rank);
    if (w.row_scale != nullptr) w.row_scale += first;
    return w;
  }
  double row_cost() const { return 2.0 * rank_cost(rank) * static_cast<double>(a.width + b.width); }
  double cost() const { return row_cost() * static_cast<double>(rows); }
};

void check_offsets(const GroupedParams& p, const char* op) {
  const UnitTable& table = *p.lora.table;
  ARDLORA_CHECK(table.kind() == UnitKind::kExperts, op, ": table must be of experts, got kind ",
                static_cast<int>(table.kind()));
  ARDLORA_CHECK(p.offsets[0] == 0, op, ": offsets must begin at 0, got ", p.offsets[0]);
  const std::size_t experts = table.ranks().size();
  for (std::size_t e = 0; e < experts; ++e) {
    ARDLORA_CHECK(p.offsets[e] <= p.offsets[e + 1], op, ": offsets must ascend, got ", p.offsets[e], " before ",
                  p.offsets[e + 1]);
  }
  ARDLORA_CHECK(p.offsets[experts] <= p.lora.x.rows, op, ": offsets must be at most the ", p.lora.x.rows,
                " rows of x, got ", p.offsets[experts]);
}

Factor whole(const Factor& all, std::int64_t rank) {
  Factor own{rank, all.width, all.features, rank, {}};
  if (rank > 0) own.segments.push_back({0, rank, 0, 0});
  return own;
}

std::vector<Expert> experts_of(const GroupedParams& p) {
  const UnitTable& table = *p.lora.table;
  std::vector<Expert> experts;
  for (std::size_t e = 0; e < table.ranks().size(); ++e) {
    const std::int64_t rank = table.ranks()[e];
    experts.push_back({p.offsets[e], p.offsets[e + 1] - p.offsets[e], table.unit_begin()[e], rank,
                       whole(table.a(), rank), whole(table.b(), rank)});
  }
  return experts;
}

double total_cost(const std::vector<Expert>& experts) {
  double total = 0.0;
  for (const Expert& e : experts) total += e.cost();
  return total;
}

// What part of [0, n) in whole grains lies before `share` of all work, when the n begin at `before` and take `each`.
std::int64_t cut(std::int64_t n, std::int64_t grain, double each, double before, double share) {
  if (share <= before) return 0;
  if (share >= before + each * static_cast<double>(n)) return n;
  const auto grains = static_cast<std::int64_t>((share - before) / (each * static_cast<double>(grain)));
  return std::min(n, grains * grain);
}

// Calls fn(expert, begin, end) for this thread's rows, about the same work for each thread.
template <typename F>
void for_rows(const std::vector<Expert>& experts, const Team& team, double total, F&& fn) {
  const double from = total * static_cast<double>(team.id) / static_cast<double>(team.size);
  const double to = total * static_cast<double>(team.id + 1) / static_cast<double>(team.size);
  double before = 0.0;
  for (const Expert& e : experts) {
    const double each = e.row_cost();
    if (e.rank > 0 && e.rows > 0) {
      const std::int64_t begin = team.id == 0 ? 0 : cut(e.rows, kRowGrain, each, before, from);
      const std::int64_t end = team.id + 1 == team.size ? e.rows : cut(e.rows, kRowGrain, each, before, to);
      if (begin < end) fn(e, begin, end);
    }
    before += e.cost();
  }
}

// Keep bits of all rows, the memory of one call: threads take their scratch from arenas of their own.
struct Mask {
  Mask(const Dropout& dropout, const MatrixView& x) {
    if (!dropout.active()) return;
    bits.stride = (x.cols + 127) / 128 * 4 + 2;  // as take_keep_bits
    memory = std::make_unique<std::uint32_t[]>(static_cast<std::size_t>(x.rows * bits.stride));
    bits.words = memory.get();
  }
  KeepBits of(const Expert& e) const {
    return bits.words == nullptr ? bits : KeepBits{bits.words + e.begin * bits.stride, bits.stride};
  }
  KeepBits bits;
  std::unique_ptr<std::uint32_t[]> memory;
};

// Shrink and expand of rows [begin, end) of one expert.
void expert_rows(const FactorView& in, const MatrixView& x, const FactorView* out, const MatrixView& y,
                 const MatrixView& h, bool masked, const KeepBits& keep_in, const KeepBits& keep_out) {
  Arena::Use arena;
  const RowPass pass(in, x, out, y, h, masked, 1, arena);
  pass.pack(Team{});
  pass.run(Team{}, keep_in, keep_out, [](auto...) {}, [](auto...) {});
}

KeepBits from_row(const KeepBits& keep, std::int64_t row) {
  return keep.words == nullptr ? keep : KeepBits{keep.words + row * keep.stride, keep.stride};
}

// Columns of both gradients of all experts, one after the other, shared between the threads in whole steps.
class OuterColumns {
 public:
  OuterColumns(const std::vector<Expert>& experts, const FactorView& grad_a, const FactorView& grad_b,
               const GroupedParams& p, const MatrixView& dy, const MatrixView& dh, const Mask& mask)
      : experts_(experts), grad_a_(grad_a), grad_b_(grad_b), p_(p), dy_(dy), dh_(dh), mask_(mask) {}

  void run(const Team& team, double total) const {
    double before = 0.0;
    for (const Expert& e : experts_) {
      const double each = rank_cost(e.rank) * static_cast<double>(std::max<std::int64_t>(e.rows, 1));
      if (e.rank > 0) {
        one(team, total, before, each, e, e.factor(e.b, grad_b_), p_.lora.h, dy_, {});
        before += each * static_cast<double>(e.b.width);
        one(team, total, before, each, e, e.factor(e.a, grad_a_), dh_, p_.lora.x, mask_.of(e));
        before += each * static_cast<double>(e.a.width);
      }
    }
  }
  double total() const {
    double sum = 0.0;
    for (const Expert& e : experts_) {
      sum += rank_cost(e.rank) * static_cast<double>(std::max<std::int64_t>(e.rows, 1) * (e.a.width + e.b.width));
    }
    return sum;
  }

 private:
  void one(const Team& team, double total, double before, double each, const Expert& e, const FactorView& grad,
           const MatrixView& h, const MatrixView& x, const KeepBits& keep) const {
    const double from = total * static_cast<double>(team.id) / static_cast<double>(team.size);
    const double to = total * static_cast<double>(team.id + 1) / static_cast<double>(team.size);
    const std::int64_t step = OuterPass::column_step(), width = grad.factor->width;
    const std::int64_t begin = team.id == 0 ? 0 : cut(width, step, each, before, from);
    const std::int64_t end = team.id + 1 == team.size ? width : cut(width, step, each, before, to);
    if (begin >= end) return;
    Arena::Use arena;
    const OuterPass pass(grad, e.hidden(h), e.activations(x), arena);
    pass.pack(0, e.rows);
    const std::int64_t block = e.rank <= 8 ? 512 : 128;  // of x, stays in L1 for all ranks
    for (std::int64_t c = begin; c < end; c += block) {
      pass.columns(grad.factor->segments.front(), c, std::min(end, c + block), keep);
    }
  }

  const std::vector<Expert>& experts_;
  FactorView grad_a_, grad_b_;
  const GroupedParams& p_;
  MatrixView dy_, dh_;
  const Mask& mask_;
};

void zero_past(const MatrixView& grad, std::int64_t live) {
  for (std::int64_t r = live; r < grad.rows; ++r) {
    std::memset(static_cast<float*>(grad.data) + r * grad.row_stride, 0,
                static_cast<std::size_t>(grad.cols) * sizeof(float));
  }
}

}  // namespace

void lora_grouped_forward(const GroupedParams& p, const MatrixView& y) {
  check_offsets(p, "lora_grouped_forward");
  check_forward(p.lora, y, DType::kFloat32);
  const Dropout& dropout = p.lora.dropout;
  const FactorView a = scaled(factor_a(p.lora), dropout.active() ? dropout.keep_scale : 1.0f), b = factor_b(p.lora);
  const std::vector<Expert> experts = experts_of(p);
  const Mask mask(dropout, p.lora.x);
  const double total = total_cost(experts);
  cpu::parallel_tasks(cpu::useful_threads(p.lora.threads, total), [&](const Team& team) {
    for_rows(experts, team, total, [&](const Expert& e, std::int64_t begin, std::int64_t end) {
      fill_keep_bits(dropout, mask.bits, p.lora.x, e.begin + begin, e.begin + end);
      const FactorView in = e.factor(e.a, a), out = e.factor(e.b, b);
      const auto part = [&](const MatrixView& m) { return rows_of(m, begin, end); };
      expert_rows(in, part(e.activations(p.lora.x)), &out, part(e.activations(y)), part(e.hidden(p.lora.h)),
                  dropout.active(), from_row(mask.of(e), begin), {});
    });
  });
}

void lora_grouped_backward(const GroupedParams& p, const MatrixView& dy, const MatrixView& dh, const MatrixView& dx,
                           const MatrixView& dA, const MatrixView& dB, float* dgate) {
  check_offsets(p, "lora_grouped_backward");
  check_backward(p.lora, dy, dh, dx, dA, dB, dgate, DType::kFloat32);
  const Dropout& dropout = p.lora.dropout;
  const FactorView a = scaled(factor_a(p.lora), dropout.active() ? dropout.keep_scale : 1.0f), b = factor_b(p.lora);
  FactorView grad_b = with_weight(b, dB);
  if (dgate != nullptr) grad_b.row_scale = nullptr;  // experts' gates are on B
  const std::vector<Expert> experts = experts_of(p);
  const Mask mask(dropout, p.lora.x);
  const double total = total_cost(experts);
  const int used = cpu::useful_threads(p.lora.threads, 2.0 * total);
  cpu::parallel_tasks(used, [&](const Team& team) {
    for_rows(experts, team, total, [&](const Expert& e, std::int64_t begin, std::int64_t end) {
      fill_keep_bits(dropout, mask.bits, p.lora.x, e.begin + begin, e.begin + end);
      const FactorView in = e.factor(e.b, b), out = e.factor(e.a, a);
      const auto part = [&](const MatrixView& m) { return rows_of(m, begin, end); };
      expert_rows(in, part(e.activations(dy)), dx.data == nullptr ? nullptr : &out, part(e.activations(dx)),
                  part(e.hidden(dh)), false, {}, from_row(mask.of(e), begin));
    });
  });
  zero_past(dA, a.factor->rows);
  zero_past(dB, b.factor->rows);
  const OuterColumns outer(experts, with_weight(a, dA), grad_b, p, dy, dh, mask);
  const double work = outer.total();
  cpu::parallel_tasks(used, [&](const Team& team) { outer.run(team, work); });
  if (dgate == nullptr) return;
  cpu::parallel_tasks(used, [&](const Team& team) {
    gate_gradient(grad_b, p.lora.lora_B, p.lora.gate, dgate, team.share(b.factor->rows, 1));
  });
}

}  // namespace ardlora
