// Every instruction of the kernels that C++ has no word for: copies into shared memory, matrix loads, tensor-core
// products, conversions. Under nvcc a wrapper is one line of PTX (sm_80 and later); any other compiler gets its twin
// from testing/simt.h, which runs the same kernels on the host. Kernels use shared memory through ARDLORA_SHARED alone.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ardlora/dtype.h"

#ifdef __CUDACC__
#define ARDLORA_DEVICE __device__ __forceinline__
#define ARDLORA_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "testing/simt.h"
#define ARDLORA_DEVICE inline
#define ARDLORA_SHARED(name) unsigned char* const name = simt::current->shared
#endif

namespace ardlora::cuda {

inline constexpr std::uint32_t kFullWarp = 0xffffffffu;

struct alignas(16) Word16 {
  std::uint32_t part[4];
};

struct alignas(8) Word8 {
  std::uint32_t part[2];
};

// ---- launches that overlap (launcher.h)

// The first statement of every kernel: waits until the kernel before it has ended and what it wrote is there, if this
// one was let begin before that, and then lets the next one come. Nothing below sm_90.
ARDLORA_DEVICE void begin_kernel() {
#ifndef __CUDACC__
  simt::begin_kernel();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- global memory, 16 bytes at an address divisible by 16

// What a pointer that was itself read from memory needs, so that the compiler knows what it points to.
template <typename T>
ARDLORA_DEVICE T* as_global(T* p) {
#ifdef __CUDACC__
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

ARDLORA_DEVICE Word16 load16(const void* from) {
#ifdef __CUDACC__
  const uint4 v = *static_cast<const uint4*>(from);
  return {v.x, v.y, v.z, v.w};
#else
  simt::check_aligned("load16", from, 16);
  return *static_cast<const Word16*>(from);
#endif
}

ARDLORA_DEVICE Word8 load8(const void* from) {
#ifdef __CUDACC__
  const uint2 v = *static_cast<const uint2*>(from);
  return {v.x, v.y};
#else
  simt::check_aligned("load8", from, 8);
  return *static_cast<const Word8*>(from);
#endif
}

ARDLORA_DEVICE void store16(void* to, const Word16& v) {
#ifdef __CUDACC__
  *static_cast<uint4*>(to) = make_uint4(v.part[0], v.part[1], v.part[2], v.part[3]);
#else
  simt::check_aligned("store16", to, 16);
  *static_cast<Word16*>(to) = v;
#endif
}

// To global memory. In one piece: where it computes neighbouring addresses, nvcc cuts `store16` into words.
ARDLORA_DEVICE void store16_global(void* to, const Word16& v) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.part[0]), "r"(v.part[1]), "r"(v.part[2]),
               "r"(v.part[3])
               : "memory");
#else
  store16(to, v);
#endif
}

ARDLORA_DEVICE void store8(void* to, std::uint32_t first, std::uint32_t second) {
#ifdef __CUDACC__
  *static_cast<uint2*>(to) = make_uint2(first, second);
#else
  simt::check_aligned("store8", to, 8);
  static_cast<std::uint32_t*>(to)[0] = first;
  static_cast<std::uint32_t*>(to)[1] = second;
#endif
}

// ---- asynchronous copies, global to shared

ARDLORA_DEVICE std::uint32_t shared_address(const void* p) {
#ifdef __CUDACC__
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
#else
  return simt::shared_address(p);
#endif
}

// Copies `valid` of 16 bytes and fills the rest with zeros. `from` must be a readable address even where valid is 0.
ARDLORA_DEVICE void cp_async16(std::uint32_t to, const void* from, int valid = 16) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
#else
  simt::cp_async(to, from, 16, valid);
#endif
}

ARDLORA_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::cp_async_commit();
#endif
}

// Waits until at most kGroups of this thread's youngest groups are in flight; other threads need a barrier as well.
template <int kGroups>
ARDLORA_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#else
  simt::cp_async_wait(kGroups);
#endif
}

// ---- fragments: kCount 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8

template <int kCount, bool kTrans = false>
ARDLORA_DEVICE void ldmatrix(std::uint32_t* r, std::uint32_t row) {
  static_assert(kCount == 2 || kCount == 4);
#ifdef __CUDACC__
  if constexpr (kCount == 4 && !kTrans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  } else if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  } else if constexpr (!kTrans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
  }
#else
  simt::ldmatrix(r, row, kCount, kTrans);
#endif
}

// ---- tensor cores: d [16, 8] += a [16, k] b [k, 8], float sums, fragments as the PTX manual draws them

// k = 16, T is BFloat16 or Float16: a has 4 registers of two elements, b has 2, d has 4 floats.
template <typename T>
ARDLORA_DEVICE void mma_k16(float* d, const std::uint32_t* a, const std::uint32_t* b) {
  constexpr bool bf16 = sizeof(T) == 2 && !std::is_same_v<T, Float16>;
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
#ifdef __CUDACC__
  if constexpr (bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  simt::mma_k16(d, a, b, bf16);
#endif
}

// k = 8, elements rounded by `to_tf32`: a has 4 registers of one element, b has 2.
ARDLORA_DEVICE void mma_tf32(float* d, const std::uint32_t* a, const std::uint32_t* b) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  simt::mma_tf32(d, a, b);
#endif
}

// ---- conversions, round to nearest even (tf32: ties away from zero, the only way the instruction has)

ARDLORA_DEVICE std::uint32_t to_tf32(float v) {
#ifdef __CUDACC__
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
#else
  return simt::to_tf32(v);
#endif
}

// Two floats in one register, `low` at the lower address.
template <typename T>
ARDLORA_DEVICE std::uint32_t pack2(float low, float high) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
#ifdef __CUDACC__
  std::uint32_t bits;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
#else
  return from_float<T>(low).bits | static_cast<std::uint32_t>(from_float<T>(high).bits) << 16;
#endif
}

template <typename T>
ARDLORA_DEVICE float widen(T v) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return __uint_as_float(static_cast<std::uint32_t>(v.bits) << 16);
  } else {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
    return out;
  }
#else
  return to_float(v);
#endif
}

template <typename T>
ARDLORA_DEVICE T narrow(float v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else {
    return {static_cast<std::uint16_t>(pack2<T>(v, 0.0f))};
  }
}

// The lower and the upper half of a register of two elements.
template <typename T>
ARDLORA_DEVICE float widen_low(std::uint32_t two) {
  return widen(T{static_cast<std::uint16_t>(two)});
}
template <typename T>
ARDLORA_DEVICE float widen_high(std::uint32_t two) {
  return widen(T{static_cast<std::uint16_t>(two >> 16)});
}

}  // namespace ardlora::cuda
