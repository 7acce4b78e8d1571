#include "cpu/cpu_features.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace ardlora::cpu {

#if defined(__x86_64__) || defined(_M_X64)
namespace {

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r;
#if defined(_MSC_VER)
  int out[4];
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {static_cast<std::uint32_t>(out[0]), static_cast<std::uint32_t>(out[1]), static_cast<std::uint32_t>(out[2]),
       static_cast<std::uint32_t>(out[3])};
#else
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
#endif
  return r;
}

// Register sets the operating system saves on a context switch: CPUID alone does not say.
std::uint64_t saved_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  std::uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<std::uint64_t>(hi) << 32) | lo;
#endif
}

constexpr bool has(std::uint32_t value, int bit) { return (value >> bit) & 1u; }

}  // namespace

std::uint32_t detect_features() {
  const Registers leaf1 = cpuid(1, 0);
  const Registers leaf7 = cpuid(7, 0);
  if (!has(leaf1.ecx, 27)) return 0;  // OSXSAVE
  const std::uint64_t state = saved_state();
  const bool ymm = (state & 0x06) == 0x06;
  const bool zmm = (state & 0xe6) == 0xe6;
  std::uint32_t features = 0;
  if (ymm && has(leaf1.ecx, 12) && has(leaf1.ecx, 29) && has(leaf7.ebx, 5)) features |= kAvx2Fma;
  if (zmm && has(leaf7.ebx, 16) && has(leaf7.ebx, 17) && has(leaf7.ebx, 30) && has(leaf7.ebx, 31)) features |= kAvx512;
  if ((features & kAvx512) != 0 && has(cpuid(7, 1).eax, 5)) features |= kAvx512Bf16;
  return features;
}
#elif defined(__aarch64__) || defined(_M_ARM64)
std::uint32_t detect_features() { return kNeon; }  // part of the baseline
#else
std::uint32_t detect_features() { return 0; }
#endif

}  // namespace ardlora::cpu
