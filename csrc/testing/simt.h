// CUDA kernels on the host: the words of CUDA C++ that the kernels use, so that their source compiles with any C++
// compiler, and twins of the instructions in cuda/ptx.h. A thread of the kernel is a fiber and runs until it must wait;
// blocks run one after another, in any order asked for. The engine (simt.cpp) is stricter than a GPU:
//   - shared memory starts as NaN, and cp.async leaves NaN at its target until the wait;
//   - only barriers order memory, so ThreadSanitizer reports a missing __syncthreads or __syncwarp, and two blocks that
//     touch one address; AddressSanitizer knows the bounds of shared memory;
//   - every thread of a kernel that a launcher starts must have begun by `begin_kernel`;
//   - lanes that meet at different instructions, and threads that wait for one that left, end the program.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "ardlora/dtype.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace simt {

inline int multiprocessors = 8;  // that the device says it has
inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kMaxWords = 6;  // that a lane shows to its warp in one instruction

struct Thread {
  dim3 thread, block, block_dim, grid_dim;
  unsigned char* shared;
  std::size_t shared_bytes;
  unsigned lane;
};

// The running thread. The engine changes it while a thread waits.
extern Thread* current;

// How `launch` orders blocks, and which of the waiting threads runs next.
enum class Order { kForward, kReverse, kSeeded };
void set_order(Order order, std::uint32_t seed = 0);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void run(dim3 grid, dim3 block, std::size_t shared_bytes, void (*body)(void*), void* arguments);

// As cudaFuncAttributeMaxDynamicSharedMemorySize: a launch that takes more than 48 KiB must have been allowed to.
void set_shared_limit(const void* kernel, std::size_t bytes);
void check_shared(const void* kernel, std::size_t bytes);

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, Arguments... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, {arguments...}};
  check_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
  run(
      grid, block, shared_bytes,
      [](void* p) {
        Call& c = *static_cast<Call*>(p);
        std::apply(c.kernel, c.arguments);
      },
      &call);
}

// What launchers have started, and whether threads that leave must have called `begin_kernel`.
struct Begins {
  unsigned launches, following;  // following: another kernel of the same call
  bool required;
};
inline Begins begins{};
void begin_kernel();

void sync_block();
void sync_warp();

// What the lanes of a warp show each other: [lane][word]. Valid until the lane's next such instruction.
using Words = const std::uint32_t (*)[kMaxWords];
Words exchange(const char* instruction, const std::uint32_t* words, unsigned count);

inline void check_aligned(const char* what, const void* p, std::uintptr_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0) fail("%s: %p is not divisible by %d", what, p, int(bytes));
}

inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(p) - current->shared);
}

inline unsigned char* shared_pointer(const char* what, std::uint32_t address, std::uint32_t bytes) {
  if (address % bytes != 0) fail("%s: shared address %u is not divisible by %u", what, address, bytes);
  if (address > current->shared_bytes || current->shared_bytes - address < bytes) {
    fail("%s: shared address %u is out of %zu bytes", what, address, current->shared_bytes);
  }
  return current->shared + address;
}

// ---- asynchronous copies

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  unsigned size, valid;
};
void queue_copy(const Copy& copy);
void cp_async_commit();
bool take_copy(int groups_left, Copy* copy);  // the oldest one outside the youngest `groups_left` groups

inline void cp_async(std::uint32_t to, const void* from, int size, int valid) {
  if (valid < 0 || valid > size) fail("cp.async: %d bytes of %d", valid, size);
  check_aligned("cp.async", from, static_cast<std::uintptr_t>(size));
  const Copy copy{shared_pointer("cp.async", to, static_cast<std::uint32_t>(size)),
                  static_cast<const unsigned char*>(from), static_cast<unsigned>(size), static_cast<unsigned>(valid)};
  for (unsigned i = 0; i < copy.size; ++i) copy.to[i] = 0xff;
  queue_copy(copy);
}

inline void cp_async_wait(int groups_left) {
  for (Copy copy; take_copy(groups_left, &copy);) {
    for (unsigned i = 0; i < copy.size; ++i) copy.to[i] = i < copy.valid ? copy.from[i] : 0;
  }
}

// ---- warp instructions

template <typename T>
T shuffle(const char* what, T value, unsigned from) {
  static_assert(sizeof(T) == 4);
  std::uint32_t word;
  std::memcpy(&word, &value, 4);
  const Words all = exchange(what, &word, 1);
  std::memcpy(&value, &all[from < kWarp ? from : current->lane][0], 4);
  return value;
}

inline void ldmatrix(std::uint32_t* r, std::uint32_t row, int count, bool trans) {
  const Words rows = exchange(trans ? "ldmatrix.trans" : "ldmatrix", &row, 1);
  const unsigned group = current->lane / 4, pair = current->lane % 4 * 2;
  for (int i = 0; i < count; ++i) {
    std::uint16_t half[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned from = trans ? pair + e : group, column = trans ? group : pair + e;
      const auto* at = shared_pointer("ldmatrix", rows[i * 8 + static_cast<int>(from)][0], 16);
      half[e] = reinterpret_cast<const std::uint16_t*>(at)[column];
    }
    r[i] = half[0] | static_cast<std::uint32_t>(half[1]) << 16;
  }
}

inline float element(std::uint32_t two, unsigned which, bool bf16) {
  const auto bits = static_cast<std::uint16_t>(two >> (16 * which));
  return bf16 ? ardlora::to_float(ardlora::BFloat16{bits}) : ardlora::to_float(ardlora::Float16{bits});
}

inline Words exchange_fragments(const char* what, const std::uint32_t* a, const std::uint32_t* b) {
  const std::uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  return exchange(what, words, 6);
}

// Exact products and one rounding; the hardware rounds in between, so results are compared with a tolerance.
inline void mma_k16(float* d, const std::uint32_t* a, const std::uint32_t* b, bool bf16) {
  const Words all = exchange_fragments(bf16 ? "mma.bf16" : "mma.f16", a, b);
  const unsigned group = current->lane / 4, pair = current->lane % 4 * 2;
  double row[2][16], column[2][16];
  for (unsigned k = 0; k < 16; ++k) {
    const unsigned lane = k % 8 / 2, upper = k / 8;
    for (unsigned i = 0; i < 2; ++i) {
      row[i][k] = element(all[group * 4 + lane][upper * 2 + i], k % 2, bf16);
      column[i][k] = element(all[(pair + i) * 4 + lane][4 + upper], k % 2, bf16);
    }
  }
  for (unsigned i = 0; i < 4; ++i) {
    double sum = d[i];
    for (unsigned k = 0; k < 16; ++k) sum += row[i / 2][k] * column[i % 2][k];
    d[i] = static_cast<float>(sum);
  }
}

inline float tf32(std::uint32_t bits) {
  bits &= 0xffffe000u;  // the tensor core ignores the rest
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void mma_tf32(float* d, const std::uint32_t* a, const std::uint32_t* b) {
  const Words all = exchange_fragments("mma.tf32", a, b);
  const unsigned group = current->lane / 4, pair = current->lane % 4 * 2;
  for (unsigned i = 0; i < 4; ++i) {
    double sum = d[i];
    for (unsigned k = 0; k < 8; ++k) {
      const double left = tf32(all[group * 4 + k % 4][k / 4 * 2 + i / 2]);
      sum += left * tf32(all[(pair + i % 2) * 4 + k % 4][4 + k / 4]);
    }
    d[i] = static_cast<float>(sum);
  }
}

inline std::uint32_t to_tf32(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace simt

// ---- CUDA's own names

#define threadIdx (::simt::current->thread)
#define blockIdx (::simt::current->block)
#define blockDim (::simt::current->block_dim)
#define gridDim (::simt::current->grid_dim)

inline void __syncthreads() { simt::sync_block(); }
inline void __syncwarp(unsigned = ~0u) { simt::sync_warp(); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return simt::shuffle("shfl.idx", value, static_cast<unsigned>(lane) % simt::kWarp);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return simt::shuffle("shfl.bfly", value, simt::current->lane ^ static_cast<unsigned>(mask));
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  return simt::shuffle("shfl.down", value, simt::current->lane + delta);
}

inline std::uint32_t __umulhi(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::uint32_t>((std::uint64_t{a} * b) >> 32);
}
inline float __uint_as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline std::uint32_t __float_as_uint(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
