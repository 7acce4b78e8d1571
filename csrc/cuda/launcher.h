// How a launcher starts a kernel: the caller's device and stream, every launch checked, no allocation, no wait. Where
// nvcc is not the compiler the same launchers run their kernels in testing/simt.h.
#pragma once

#include <atomic>
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
  bool follows = false;    // another kernel of ours in the same call
};

inline std::atomic<bool> overlapping = false;

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

// Whether the code of a kernel that runs on the current device waits for the kernel before it (`begin_kernel`): code
// for sm_80 may run on a newer device, and does not.
inline bool waits(const char* op, const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [at, is_new] = known.try_emplace({kernel, current_device(op)}, false);
  if (is_new) {
    cudaFuncAttributes code{};
    check(op, cudaFuncGetAttributes(&code, kernel));
    at->second = code.ptxVersion >= 90;
  }
  return at->second;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
                               Arguments... arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
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

// On the current device; a grid without blocks is no launch, and false.
template <typename... Parameters, typename... Arguments>
bool launch(const char* op, void (*kernel)(Parameters...), const Grid& grid, [[maybe_unused]] void* stream,
            Arguments... arguments) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return false;
  if (grid.shared > kSharedWithoutAsking) allow_shared(op, reinterpret_cast<const void*>(kernel), grid.shared);
#ifdef __CUDACC__
  const auto to = static_cast<cudaStream_t>(stream);
  cudaError_t status = cudaSuccess;
  if (grid.follows && overlapping && waits(op, reinterpret_cast<const void*>(kernel))) {
    status = launch_overlapping(kernel, grid, to, arguments...);
  } else {
    kernel<<<grid.blocks, grid.threads, grid.shared, to>>>(arguments...);
  }
  if (const cudaError_t last = cudaGetLastError(); status == cudaSuccess) status = last;
  if (status == cudaSuccess) return true;
  fail(ErrorKind::kRuntime, op, ": CUDA failed: ", cudaGetErrorString(status),
       ", here or in an earlier kernel; launched ", grid.blocks.x, " x ", grid.blocks.y, " x ", grid.blocks.z,
       " blocks of ", grid.threads, " threads with ", grid.shared, " bytes");
#else
  simt::begins = {simt::begins.launches + 1, simt::begins.following + (grid.follows ? 1u : 0u), true};
  simt::launch(kernel, grid.blocks, dim3{grid.threads}, grid.shared, arguments...);
  simt::begins.required = false;
  return true;
#endif
}

}  // namespace ardlora::cuda
