#include "cuda/launch.h"

#include "cuda/launcher.h"
#include "cuda/rank_resize.cuh"

namespace ardlora::cuda {

#ifdef __CUDACC__
bool built() { return true; }

std::string problem(int device) {
  DeviceFacts facts{};
  cudaDriverGetVersion(&facts.driver);
  cudaRuntimeGetVersion(&facts.runtime);
  int major = 0, minor = 0, before = 0;
  if (cudaGetDevice(&before) == cudaSuccess) {
    if (device < 0) device = before;
    const DeviceGuard guard("problem", device);
    cudaFuncAttributes code{};
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess) {
      facts.capability = 10 * major + minor;
    }
    facts.has_code = cudaFuncGetAttributes(&code, rank_resize_kernel) == cudaSuccess;
  }
  cudaGetLastError();  // what was asked is no error of a later launch
  return problem_of(facts);
}
#endif

bool overlap_launches(bool on) { return overlapping.exchange(on); }

void rank_resize(const std::int64_t* table, std::int64_t jobs, std::int64_t blocks, Stream stream) {
  constexpr const char* op = "rank_resize";
  if (blocks == 0) return;
  ARDLORA_CHECK(table != nullptr, op, ": table must not be null");
  const DeviceGuard guard(op, stream.device);
  launch(op, rank_resize_kernel, {dim3{static_cast<unsigned>(blocks)}, kResizeThreads}, stream.handle, table, jobs);
}

}  // namespace ardlora::cuda
