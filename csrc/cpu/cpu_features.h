// What this processor and its operating system can run; nothing else reads CPUID.
#pragma once

#include <cstdint>

namespace ardlora::cpu {

enum Feature : std::uint32_t {
  kAvx2Fma = 1u << 0,     // with F16C
  kAvx512 = 1u << 1,      // F, BW, DQ and VL
  kAvx512Bf16 = 1u << 2,  // the dot product of bf16 pairs
  kNeon = 1u << 3,
};

std::uint32_t detect_features();

}  // namespace ardlora::cpu
