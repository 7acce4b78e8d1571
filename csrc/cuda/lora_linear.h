// The LoRA linear of ardlora/lora_linear.h on a CUDA device: same arguments and results, every pointer in device
// memory. A call allocates nothing and waits for nothing; with unchanged arguments it may be captured in a graph.
// Adapters and H are rounded to the activations' type for the tensor cores, as autocast does, and H is kept in it; sums
// are float.
#pragma once

#include "ardlora/lora_grouped.h"
#include "ardlora/lora_linear.h"
#include "cuda/gemm_plan.h"
#include "cuda/launch.h"

namespace ardlora::cuda {

struct DeviceCall {
  const LoraPlans* plans;  // of p.table, the rows and type of p.x and whether there is dropout
  const void* table;       // segment_table(*p.table)'s words (segment_table.h), at an address divisible by 16
  void* workspace;         // plans->workspace bytes at an address divisible by 16; may be null where there are none
  std::int64_t workspace_bytes;
  Stream stream;
};

// What the adapter's part is added to.
struct Onto {
  bool nothing = false;        // y = bias + it, dx = it, whatever was there; every unit has a rank
  const void* bias = nullptr;  // [out_features] in the type of y, or null for 0
};

LoraPlans plan_lora(const UnitTable& table, std::int64_t rows, DType activations, bool dropout, int device);

void lora_forward(const LoraParams& p, const MatrixView& y, const DeviceCall& call, const Onto& onto = {});
void lora_backward(const LoraParams& p, const MatrixView& dy, const MatrixView& dh, const MatrixView& dx,
                   const MatrixView& dA, const MatrixView& dB, float* dgate, const DeviceCall& call,
                   const Onto& onto = {});

// As in ardlora/lora_grouped.h. The offsets are in device memory and stay there, so that they cannot be refused: rows
// that bad ones give to no expert, or to two, stay as they are or with the first.
void lora_grouped_forward(const GroupedParams& p, const MatrixView& y, const DeviceCall& call);
void lora_grouped_backward(const GroupedParams& p, const MatrixView& dy, const MatrixView& dh, const MatrixView& dx,
                           const MatrixView& dA, const MatrixView& dB, float* dgate, const DeviceCall& call);

Multiprocessors multiprocessors(int device);

}  // namespace ardlora::cuda
