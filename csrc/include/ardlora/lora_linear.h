// The LoRA linear out of three grouped primitives over a factor's segments (unit_table.h), W [rows, width] rank-major:
//   shrink  H[M, R]  = scale * sum over segments of  row_scale o (X[:, cols] W^T)
//   expand  Y[M, N] += scale * (row_scale o H) W         on each segment's columns
//   outer   dW       = scale * row_scale o (H^T X[:, cols])
// `apply` is shrink then expand: forward with (A, B) on (x, y), backward with (B, A) on (dy, dx).
// Dropout masks x before shrink and outer and dx after expand; the base never sees it.
// Results do not depend on the number of threads, and two runs are bitwise equal.
#pragma once

#include "ardlora/philox.h"
#include "ardlora/unit_table.h"
#include "ardlora/view.h"

namespace ardlora {

// One factor in one call.
struct FactorView {
  const Factor* factor;
  MatrixView weight;       // [>= rows, width], contiguous rows
  const float* row_scale;  // [rows] gates, or null for 1
  float scale;
};

void shrink(const FactorView& w, const MatrixView& x, const MatrixView& h, int threads);
void expand(const FactorView& w, const MatrixView& h, const MatrixView& y, int threads);
// Rows of `w.weight` (float32) past the live ones are zeroed.
void outer(const FactorView& w, const MatrixView& h, const MatrixView& x, int threads);

struct LoraParams {
  const UnitTable* table;
  MatrixView x;       // [M, K]
  MatrixView lora_A;  // [>= a.rows, a.width]
  MatrixView lora_B;  // [>= b.rows, b.width]
  const float* gate;  // [gated rows] or null
  float scaling;
  MatrixView h;  // [M, hidden] float32 on the CPU, the type of x on CUDA
  int threads;
  Dropout dropout = {};  // of x on its way into the adapter
};

// y [M, N] += scaling * (g o (x A^T)) B; writes h for the backward pass.
void lora_forward(const LoraParams& p, const MatrixView& y);

// dx [M, K] += ..., dA and dB (float32, same shape as the parameters) are overwritten. `dx.data` may be null when the
// input needs no gradient. `dgate` [gated rows] may be null; it costs one more pass over the gated factor's gradient.
// `dh` [M, hidden], of h's type, is scratch.
void lora_backward(const LoraParams& p, const MatrixView& dy, const MatrixView& dh, const MatrixView& dx,
                   const MatrixView& dA, const MatrixView& dB, float* dgate);

}  // namespace ardlora
