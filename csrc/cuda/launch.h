// The CUDA backend's entry points. A build without nvcc answers each launch with one sentence (unavailable.cpp).
// A launch uses the caller's device and stream, allocates nothing and waits for nothing.
#pragma once

#include <cstdint>
#include <string>

#include "ardlora/regularizer.h"

namespace ardlora::cuda {

bool built();  // this build has kernels

// What tensors must do instead of being on this device (negative: the current one), or "" where kernels run there.
std::string problem(int device);

// The same from what a device and its driver say of themselves.
struct DeviceFacts {
  int driver;      // the CUDA version it is for, as CUDA writes it: 12040; 0 without one
  int runtime;     // the CUDA version of this build
  int capability;  // 75, or 0 where it could not be asked
  bool has_code;   // this build has kernels for it
};
std::string problem_of(const DeviceFacts& facts);

// Whether a kernel that follows another of the same call may begin before that has ended, where it runs on compute
// capability 9.0 or newer. For the whole process; returns what was before.
bool overlap_launches(bool on);

struct Stream {
  int device;
  void* handle;  // cudaStream_t
};

// `table` is a ResizeTable's words in device memory, at an address divisible by 8.
void rank_resize(const std::int64_t* table, std::int64_t jobs, std::int64_t blocks, Stream stream);

// A RowTable's words in device memory, at an address divisible by 8.
struct DeviceRows {
  const std::int64_t* table;
  std::int64_t jobs;
  std::int64_t rows;
};

// out [rows] = <weight_i, grad_i>
void row_dots(const DeviceRows& rows, float* out, Stream stream);

// One step of the running means of every entry (AdaLoRA's sensitivity and uncertainty), and each row's mean score. All
// or nothing: where an entry of weight * grad is not finite, means and scores stay.
struct ImportanceParams {
  double beta1;
  double beta2;
  float* workspace;  // [rows + 1]; the last one tells afterwards: 1 done, 0 not finite
  float* score;      // [rows] mean over the row of sensitivity * uncertainty
};

void importance(const DeviceRows& rows, const ImportanceParams& p, Stream stream);

// As in ardlora/regularizer.h, every pointer to device memory. Alphas live on the host, where ranks are decided.
void set_gates(const GateBlock* blocks, std::int64_t units, const double* rho, const GateParams& p, Stream stream);

}  // namespace ardlora::cuda
