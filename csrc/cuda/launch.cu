#include "cuda/launch.h"

#include "cuda/launcher.h"
#include "cuda/rank_resize.cuh"

namespace ardlora::cuda {

#ifdef __CUDACC__
bool built() { return true; }

bool available() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
}
#endif

void rank_resize(const std::int64_t* table, std::int64_t jobs, std::int64_t blocks, Stream stream) {
  constexpr const char* op = "rank_resize";
  if (blocks == 0) return;
  ARDLORA_CHECK(table != nullptr, op, ": table must not be null");
  const DeviceGuard guard(op, stream.device);
  launch(op, rank_resize_kernel, {dim3{static_cast<unsigned>(blocks)}, kResizeThreads}, stream.handle, table, jobs);
}

}  // namespace ardlora::cuda
