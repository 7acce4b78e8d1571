#include <sstream>

#include "cuda/launch.h"

namespace ardlora::cuda {

std::string problem_of(const DeviceFacts& facts) {
  constexpr int kLeastCapability = 80;  // of mma.sync with bfloat16 and of cp.async
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  const auto capability = [](int v) { return std::to_string(v / 10) + "." + std::to_string(v % 10); };
  std::ostringstream out;
  if (facts.driver / 1000 < facts.runtime / 1000) {
    out << "be on the CPU, the driver is for CUDA " << version(facts.driver) << " and this build needs "
        << version(facts.runtime / 1000 * 1000) << " or newer";
  } else if (facts.capability > 0 && facts.capability < kLeastCapability) {
    out << "be on the CPU, the device has compute capability " << capability(facts.capability)
        << " and the kernels need " << capability(kLeastCapability);
  } else if (!facts.has_code) {
    out << "be on the CPU, this build has no kernels for compute capability " << capability(facts.capability)
        << " (see CMAKE_CUDA_ARCHITECTURES in docs/cuda.md)";
  }
  return out.str();
}

}  // namespace ardlora::cuda
