#include "core/lora_checks.h"

namespace ardlora {

void check_factor(const FactorView& w, const char* op, const char* name) {
  check_view(w.weight, w.factor->width, op, name);
  ARDLORA_CHECK(w.weight.rows >= w.factor->rows, op, ": ", name, " must have at least ", w.factor->rows, " rows, got ",
                w.weight.rows);
}

void check_gradient(const FactorView& w, const char* op, const char* name) {
  check_factor(w, op, name);
  ARDLORA_CHECK(w.weight.dtype == DType::kFloat32, op, ": ", name, " must be float32, got ",
                dtype_name(w.weight.dtype));
}

void check_activations(const FactorView& w, const MatrixView& x, const char* op, const char* name) {
  check_view(x, w.factor->features, op, name);
  check_dtype_pair(x.dtype, w.weight.dtype, op);
}

void check_hidden(const MatrixView& h, const FactorView& w, std::int64_t rows, DType dtype, const char* op) {
  ARDLORA_CHECK(h.dtype == dtype, op, ": h must be ", dtype_name(dtype), ", got ", dtype_name(h.dtype));
  ARDLORA_CHECK(h.cols >= 0, op, ": h must have columns, got ", h.cols);
  check_view(h, h.cols, op, "h");
  ARDLORA_CHECK(h.rows == rows, op, ": h must have ", rows, " rows, got ", h.rows);
  for (const Segment& s : w.factor->segments) {
    ARDLORA_CHECK(s.h_begin + s.rank <= h.cols, op, ": h must have at least ", s.h_begin + s.rank, " columns, got ",
                  h.cols);
  }
}

FactorView factor_a(const LoraParams& p) {
  return {&p.table->a(), p.lora_A, p.table->gate_on_a() ? p.gate : nullptr, 1.0f};
}

FactorView factor_b(const LoraParams& p) {
  return {&p.table->b(), p.lora_B, p.table->gate_on_a() ? nullptr : p.gate, p.scaling};
}

FactorView with_weight(FactorView factor, const MatrixView& weight) {
  factor.weight = weight;
  return factor;
}

void check_ungrouped(const UnitTable& table, const char* op) {
  ARDLORA_CHECK(table.kind() != UnitKind::kExperts, op, ": table must not be of experts, got ", table.ranks().size(),
                " experts; their rows come grouped");
}

void check_forward(const LoraParams& p, const MatrixView& y, DType hidden) {
  constexpr const char* op = "lora_forward";
  const FactorView a = factor_a(p), b = factor_b(p);
  check_factor(a, op, "lora_A");
  check_factor(b, op, "lora_B");
  check_activations(a, p.x, op, "x");
  check_activations(b, y, op, "y");
  check_hidden(p.h, a, p.x.rows, hidden, op);
  check_hidden(p.h, b, y.rows, hidden, op);
}

void check_backward(const LoraParams& p, const MatrixView& dy, const MatrixView& dh, const MatrixView& dx,
                    const MatrixView& dA, const MatrixView& dB, const float* dgate, DType hidden) {
  constexpr const char* op = "lora_backward";
  const FactorView a = factor_a(p), b = factor_b(p);
  ARDLORA_CHECK(dgate == nullptr || p.gate != nullptr, op, ": dgate must come with a gate");
  check_factor(a, op, "lora_A");
  check_factor(b, op, "lora_B");
  check_gradient(with_weight(a, dA), op, "dA");
  check_gradient(with_weight(b, dB), op, "dB");
  check_activations(a, p.x, op, "x");
  check_activations(b, dy, op, "dy");
  check_hidden(p.h, b, dy.rows, hidden, op);
  check_hidden(dh, b, dy.rows, hidden, op);
  check_hidden(dh, a, p.x.rows, hidden, op);
  if (dx.data == nullptr) return;
  check_activations(a, dx, op, "dx");
  ARDLORA_CHECK(dx.rows == dy.rows, op, ": dx must have ", dy.rows, " rows, got ", dx.rows);
}

}  // namespace ardlora
