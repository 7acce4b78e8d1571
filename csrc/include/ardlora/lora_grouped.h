// The adapters of a mixture of experts: rows come sorted by expert, and each meets the factors of its own. Expert e has
// rows [offsets[e], offsets[e + 1]) of the activations and rows [unit_begin[e], unit_begin[e + 1]) of both factors; it
// may have none of either. Rows past the last offset belong to no expert and stay as they are. Where dropout has
// `rows`, the masks are those of the tokens, however they are sorted. Results do not depend on the number of threads,
// and two runs are bitwise equal.
#pragma once

#include "ardlora/lora_linear.h"

namespace ardlora {

struct GroupedParams {
  LoraParams lora;  // table of kExperts; h [M, >= largest rank]: what lies past an expert's rank means nothing
  const std::int64_t* offsets;  // [experts + 1], from 0 on, ascending, at most M
};

// y_m += scaling * (g o (x_m A_e^T)) B_e for each row m of expert e; writes h for the backward pass.
void lora_grouped_forward(const GroupedParams& p, const MatrixView& y);

// As lora_backward: dx += ..., dA and dB are overwritten, with zeros for experts without rows.
void lora_grouped_backward(const GroupedParams& p, const MatrixView& dy, const MatrixView& dh, const MatrixView& dx,
                           const MatrixView& dA, const MatrixView& dB, float* dgate);

}  // namespace ardlora
