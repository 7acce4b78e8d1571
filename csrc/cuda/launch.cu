#include <cuda_runtime.h>

#include "ardlora/check.h"
#include "cuda/launch.h"
#include "cuda/rank_resize.cuh"

namespace ardlora::cuda {
namespace {

void check(const char* op, cudaError_t status) {
  if (status != cudaSuccess) fail(ErrorKind::kRuntime, op, ": CUDA failed: ", cudaGetErrorString(status));
}

class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) {
    check(op, cudaGetDevice(&before_));
    check(op, cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

}  // namespace

bool built() { return true; }

bool available() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
}

void rank_resize(const std::int64_t* table, std::int64_t jobs, std::int64_t blocks, Stream stream) {
  constexpr const char* op = "rank_resize";
  if (blocks == 0) return;
  ARDLORA_CHECK(table != nullptr, op, ": table must not be null");
  const DeviceGuard guard(op, stream.device);
  rank_resize_kernel<<<static_cast<unsigned>(blocks), kResizeThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(
      table, jobs);
  check(op, cudaGetLastError());
}

}  // namespace ardlora::cuda
