// Storage types of activations and adapters; accumulation is always float.
#pragma once

#include <cstdint>
#include <cstring>

#include "ardlora/check.h"

namespace ardlora {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
inline constexpr int kDTypeCount = 3;

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline float to_float(Float16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  float out;
  if (magnitude < 0x0400u) {  // zero and subnormals: a multiple of 2^-24
    out = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return sign != 0 ? -out : out;
  }
  std::uint32_t bits = sign | ((magnitude << 13) + (112u << 23));
  if (magnitude >= 0x7c00u) bits = sign | 0x7f800000u | (magnitude << 13);  // infinity and NaN
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// Narrowing rounds to nearest even, as torch does; NaN stays a (quiet) NaN.
template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((bits >> 16) | 0x0040u)};
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<std::uint16_t>(bits >> 16)};
}

template <>
inline Float16 from_float<Float16>(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x03ffu))};
  if (bits >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the last bits
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return {static_cast<std::uint16_t>(sign | (bits - 0x3f000000u))};
  }
  bits += 0x0fffu + ((bits >> 13) & 1u) - (112u << 23);
  return {static_cast<std::uint16_t>(sign | (bits >> 13))};
}

inline std::int64_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline const char* dtype_name(DType dtype) {
  constexpr const char* kNames[kDTypeCount] = {"float32", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

inline DType dtype_from_code(int code, const char* op) {
  ARDLORA_CHECK(code >= 0 && code < kDTypeCount, op, ": dtype must be float32, bfloat16 or float16, got code ", code);
  return static_cast<DType>(code);
}

// Adapters are float32 or of the activations' own type: the allowed pairs are listed here and nowhere else.
inline void check_dtype_pair(DType activation, DType adapter, const char* op) {
  ARDLORA_CHECK(adapter == DType::kFloat32 || adapter == activation, op,
                ": adapter dtype must be float32 or equal the activations' ", dtype_name(activation), ", got ",
                dtype_name(adapter));
}

}  // namespace ardlora
