// Storage types of activations and adapters; accumulation is always float.
#pragma once

#include <cstdint>
#include <cstring>

#include "ardlora/check.h"

namespace ardlora {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };
inline constexpr int kDTypeCount = 2;

struct BFloat16 {
  std::uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// Rounds to nearest even, as torch does; NaN stays a (quiet) NaN.
inline BFloat16 to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((bits >> 16) | 0x0040u)};
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<std::uint16_t>(bits >> 16)};
}

inline const char* dtype_name(DType dtype) { return dtype == DType::kFloat32 ? "float32" : "bfloat16"; }

inline DType dtype_from_code(int code, const char* op) {
  ARDLORA_CHECK(code >= 0 && code < kDTypeCount, op, ": dtype must be float32 or bfloat16, got code ", code);
  return static_cast<DType>(code);
}

// Adapters are float32 or of the activations' own type: the allowed pairs are listed here and nowhere else.
inline void check_dtype_pair(DType activation, DType adapter, const char* op) {
  ARDLORA_CHECK(adapter == DType::kFloat32 || adapter == activation, op,
                ": adapter dtype must be float32 or equal the activations' ", dtype_name(activation), ", got ",
                dtype_name(adapter));
}

}  // namespace ardlora
