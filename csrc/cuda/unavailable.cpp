#include "cuda/unavailable.h"

#include "ardlora/check.h"

namespace ardlora::cuda {

bool available() { return false; }

void fail_unavailable(const char* op) {
  fail(ErrorKind::kNotImplemented, op, ": tensors must be on the CPU, this build has no CUDA kernels");
}

}  // namespace ardlora::cuda
