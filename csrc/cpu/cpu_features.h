// What this processor and its operating system can run; nothing else reads CPUID.
#pragma once

#include <cstdint>

namespace ardlora::cpu {

enum Feature : std::uint32_t { kAvx2Fma = 1u << 0, kAvx512 = 1u << 1 };  // kAvx512: F, BW, DQ and VL

std::uint32_t detect_features();

}  // namespace ardlora::cpu
