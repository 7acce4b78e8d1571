// How a launcher starts a kernel: the caller's device and stream, every launch checked, no allocation, no wait. Where
// nvcc is not the compiler the same launchers run their kernels in testing/simt.h.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

#include "ardlora/check.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace ardlora::cuda {

struct Grid {
  dim3 blocks;
  unsigned threads;
  std::size_t shared = 0;  // bytes of dynamic shared memory
};

inline constexpr std::size_t kSharedWithoutAsking = 48 * 1024;

#ifdef __CUDACC__

inline void check(const char* op, cudaError_t status) {
  if (status != cudaSuccess) fail(ErrorKind::kRuntime, op, ": CUDA failed: ", cudaGetErrorString(status));
}

class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) {
    check(op, cudaGetDevice(&before_));
    if (before_ == device) return;
    check(op, cudaSetDevice(device));
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int current_device(const char* op) {
  int device = 0;
  check(op, cudaGetDevice(&device));
  return device;
}

inline void set_shared_limit(const char* op, const void* kernel, std::size_t bytes) {
  check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

#else

struct DeviceGuard {
  DeviceGuard(const char*, int) {}
};

inline int current_device(const char*) { return 0; }
inline void set_shared_limit(const char*, const void* kernel, std::size_t bytes) {
  simt::set_shared_limit(kernel, bytes);
}

#endif

// Lets a kernel have more shared memory on the current device than it gets without asking. The limit only grows:
// threads that launch the kernel with different sizes do not take from each other.
inline void allow_shared(const char* op, const void* kernel, std::size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, std::size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  std::size_t& most = allowed[{kernel, current_device(op)}];
  if (bytes <= most) return;
  set_shared_limit(op, kernel, bytes);
  most = bytes;
}

// On the current device; a grid without blocks is no launch.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const Grid& grid, [[maybe_unused]] void* stream,
            Arguments... arguments) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  if (grid.shared > kSharedWithoutAsking) allow_shared(op, reinterpret_cast<const void*>(kernel), grid.shared);
#ifdef __CUDACC__
  kernel<<<grid.blocks, grid.threads, grid.shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return;
  fail(ErrorKind::kRuntime, op, ": CUDA failed: ", cudaGetErrorString(status),
       ", here or in an earlier kernel; launched ", grid.blocks.x, " x ", grid.blocks.y, " x ", grid.blocks.z,
       " blocks of ", grid.threads, " threads with ", grid.shared, " bytes");
#else
  simt::launch(kernel, grid.blocks, dim3{grid.threads}, grid.shared, arguments...);
#endif
}

}  // namespace ardlora::cuda
