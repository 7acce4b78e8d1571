// What every backend's LoRA linear checks before anything changes, and the two factors of one call.
#pragma once

#include "ardlora/lora_linear.h"

namespace ardlora {

void check_factor(const FactorView& w, const char* op, const char* name);
void check_gradient(const FactorView& w, const char* op, const char* name);
void check_activations(const FactorView& w, const MatrixView& x, const char* op, const char* name);
void check_hidden(const MatrixView& h, const FactorView& w, std::int64_t rows, DType dtype, const char* op);

FactorView factor_a(const LoraParams& p);
FactorView factor_b(const LoraParams& p);
FactorView with_weight(FactorView factor, const MatrixView& weight);

// Experts' rows come grouped (lora_grouped.h): other passes would add up all experts.
void check_ungrouped(const UnitTable& table, const char* op);
void check_forward(const LoraParams& p, const MatrixView& y, DType hidden);
void check_backward(const LoraParams& p, const MatrixView& dy, const MatrixView& dh, const MatrixView& dx,
                    const MatrixView& dA, const MatrixView& dB, const float* dgate, DType hidden);

}  // namespace ardlora
