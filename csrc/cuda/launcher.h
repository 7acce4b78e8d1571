// How a launcher starts a kernel: the caller's device and stream, every launch checked, no allocation, no wait. Where
// nvcc is not the compiler the same launchers run their kernels in testing/simt.h.
#pragma once

#include <cstddef>

#include "ardlora/check.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace ardlora::cuda {

struct Grid {
  dim3 blocks;
  unsigned threads;
  std::size_t shared = 0;  // bytes of dynamic shared memory
};

#ifdef __CUDACC__

inline void check(const char* op, cudaError_t status) {
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

// On the current device; a grid without blocks is no launch.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const Grid& grid, void* stream, Arguments... arguments) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  if (grid.shared > kWithoutAsking) {
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared)));
  }
  kernel<<<grid.blocks, grid.threads, grid.shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(op, cudaGetLastError());
}

#else

struct DeviceGuard {
  DeviceGuard(const char*, int) {}
};

template <typename... Parameters, typename... Arguments>
void launch(const char*, void (*kernel)(Parameters...), const Grid& grid, void*, Arguments... arguments) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  simt::launch(kernel, grid.blocks, dim3{grid.threads}, grid.shared, arguments...);
}

#endif

}  // namespace ardlora::cuda
