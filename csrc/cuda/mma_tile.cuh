// Tiles in shared memory and the fragments that the tensor cores take from them, for T = BFloat16, Float16 and float.
//
// A tile is cut into panels of 128 bytes width; a panel's row is eight chunks of 16 bytes, chunk c of row r lies at
// c ^ key(r). Every access below is free of bank conflicts: copies of whole rows, ldmatrix over eight rows, and the
// single floats that stand in for ldmatrix.trans, which knows 16-bit elements alone.
//
// One step of the product takes 32 bytes of the summed dimension: 16 elements of 16 bits in one instruction, or 8
// floats in three, each factor cut into two tf32 (a_hi b_hi + a_hi b_lo + a_lo b_hi; what is left out is below 2^-21 of
// |a b|).
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/gemm_plan.h"
#include "cuda/ptx.h"

namespace ardlora::cuda {

template <typename T>
struct Tile {
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements
  static constexpr int kPanel = 8 * kChunk;                        // columns of a panel
  static constexpr int kStep = 2 * kChunk;                         // elements of the summed dimension in one product

  unsigned char* data;
  int rows;  // of a panel, a multiple of 8

  ARDLORA_DEVICE int offset(int row, int column) const {
    const int key = (row & 3) << 1 | (row >> 2 & 1), chunk = column / kChunk;
    return ((chunk / 8) * rows + row) * kPanelBytes + (((chunk & 7) ^ key) << 4) +
           (column % kChunk) * static_cast<int>(sizeof(T));
  }
  ARDLORA_DEVICE T* at(int row, int column) const { return reinterpret_cast<T*>(data + offset(row, column)); }
  ARDLORA_DEVICE std::uint32_t address(int row, int column) const {
    return shared_address(data) + static_cast<std::uint32_t>(offset(row, column));
  }
};

template <typename T>
ARDLORA_HOST_DEVICE constexpr int tile_bytes(int rows, int columns) {
  return tile_bytes(static_cast<int>(sizeof(T)), rows, columns);
}

ARDLORA_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % 32); }
ARDLORA_DEVICE int warp_id() { return static_cast<int>(threadIdx.x / 32); }

// ---- fragments: four registers each. A is [16, kStep]; B is [kStep, 16], two products wide: b and b + 2.

template <typename T>
ARDLORA_DEVICE void load_a(std::uint32_t* a, const Tile<T>& t, int row, int step) {  // A = t[row + i, step + k]
  const int matrix = lane_id() / 8, r = lane_id() % 8;
  ldmatrix<4>(a, t.address(row + r + matrix % 2 * 8, step + matrix / 2 * Tile<T>::kChunk));
}

template <typename T>
ARDLORA_DEVICE void load_b(std::uint32_t* b, const Tile<T>& t, int row, int step) {  // B = t[row + j, step + k]
  const int matrix = lane_id() / 8, r = lane_id() % 8;
  ldmatrix<4>(b, t.address(row + r + matrix / 2 * 8, step + matrix % 2 * Tile<T>::kChunk));
}

template <typename T>
ARDLORA_DEVICE void load_a_trans(std::uint32_t* a, const Tile<T>& t, int step,
                                 int column) {  // A = t[step + k, column + i]
  if constexpr (sizeof(T) == 2) {
    const int matrix = lane_id() / 8, r = lane_id() % 8;
    ldmatrix<4, true>(a, t.address(step + r + matrix / 2 * 8, column + matrix % 2 * 8));
  } else {
    const int group = lane_id() / 4, in_group = lane_id() % 4;
    for (int i = 0; i < 4; ++i) {
      a[i] = *reinterpret_cast<const std::uint32_t*>(t.at(step + in_group + i / 2 * 4, column + group + i % 2 * 8));
    }
  }
}

template <typename T>
ARDLORA_DEVICE void load_b_trans(std::uint32_t* b, const Tile<T>& t, int step,
                                 int column) {  // B = t[step + k, column + j]
  if constexpr (sizeof(T) == 2) {
    const int matrix = lane_id() / 8, r = lane_id() % 8;
    ldmatrix<4, true>(b, t.address(step + r + matrix % 2 * 8, column + matrix / 2 * 8));
  } else {
    const int group = lane_id() / 4, in_group = lane_id() % 4;
    for (int i = 0; i < 4; ++i) {
      b[i] = *reinterpret_cast<const std::uint32_t*>(t.at(step + in_group + i % 2 * 4, column + group + i / 2 * 8));
    }
  }
}

ARDLORA_DEVICE float as_float(std::uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
#endif
}

ARDLORA_DEVICE std::uint32_t as_bits(float value) {
#ifdef __CUDACC__
  return __float_as_uint(value);
#else
  std::uint32_t out;
  std::memcpy(&out, &value, sizeof out);
  return out;
#endif
}

template <int kCount>
ARDLORA_DEVICE void split_tf32(const std::uint32_t* v, std::uint32_t* high, std::uint32_t* low) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    high[i] = to_tf32(as_float(v[i]));
    low[i] = to_tf32(as_float(v[i]) - as_float(high[i]));
  }
}

// c [16, 8] += a b. Lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next, of c.
template <typename T>
ARDLORA_DEVICE void multiply_add(float* c, const std::uint32_t* a, const std::uint32_t* b) {
  if constexpr (sizeof(T) == 2) {
    mma_k16<T>(c, a, b);
  } else {
    std::uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
    split_tf32<4>(a, a_high, a_low);
    split_tf32<2>(b, b_high, b_low);
    mma_tf32(c, a_low, b_high);
    mma_tf32(c, a_high, b_low);
    mma_tf32(c, a_high, b_high);
  }
}

// ---- global to shared

// A matrix of T in global memory, as a kernel argument. `vector`: every 16-byte chunk lies at a multiple of 16 bytes
// and wholly inside or wholly outside the matrix.
struct Activations {
  void* data;
  std::int64_t stride;
  std::int32_t rows;
  bool vector;
};

// Starts copying rows [row, row + tile.rows) and columns [column, column + kColumns), of which columns before `end`
// exist; the rest becomes zero. Complete after the thread's cp_async_wait and a barrier.
template <typename T, int kThreads, int kColumns>
ARDLORA_DEVICE void copy_async(const Tile<T>& tile, const Activations& x, int row, int column, int end) {
  constexpr int kPerRow = kColumns / Tile<T>::kChunk;
  const T* const data = static_cast<const T*>(x.data);
  if (x.vector) {
    const int c = static_cast<int>(threadIdx.x) % kPerRow * Tile<T>::kChunk;
    const bool inside = column + c < end;
#pragma unroll 4
    for (int r = static_cast<int>(threadIdx.x) / kPerRow; r < tile.rows; r += kThreads / kPerRow) {
      const bool valid = inside && row + r < x.rows;
      cp_async16(tile.address(r, c), valid ? data + (row + r) * x.stride + column + c : data, valid ? 16 : 0);
    }
  } else {
    const int c = static_cast<int>(threadIdx.x) % kColumns;
    for (int r = static_cast<int>(threadIdx.x) / kColumns; r < tile.rows; r += kThreads / kColumns) {
      const bool valid = column + c < end && row + r < x.rows;
      *tile.at(r, c) = valid ? data[(row + r) * x.stride + column + c] : narrow<T>(0.0f);
    }
  }
}

// A factor's weight or H, float or T, that becomes T on its way.
struct Operand {
  const void* data;
  std::int64_t stride;
  bool is_float;  // else the activations' type
  bool vector;    // as in Activations
};

// Part of a tile on its way through registers: `fetch` issues the loads, `store` waits for them, converts, multiplies
// row r with scale[r] (null: 1) and writes. What lies outside [valid_rows, valid_columns) becomes zero.
template <typename T, int kThreads, int kElements>
struct Staged {
  static constexpr int kChunk = Tile<T>::kChunk;
  std::uint32_t raw[kElements];

  // Elements [first, first + kThreads * kElements) of a tile of `rows` x 2^log_columns.
  ARDLORA_DEVICE void fetch(const Operand& from, std::int64_t row, std::int64_t column, int rows, int log_columns,
                            int valid_rows, int valid_columns, int first = 0) {
    const int count = rows << log_columns, mask = (1 << log_columns) - 1;
    if (from.vector) {
#pragma unroll
      for (int q = 0; q < kElements / kChunk; ++q) {
        const int i = first + (static_cast<int>(threadIdx.x) + q * kThreads) * kChunk, r = i >> log_columns,
                  c = i & mask;
        if (i >= count) break;
        const std::int64_t at = (row + r) * from.stride + column + c;
#pragma unroll
        for (int piece = 0; piece < kChunk / 4; ++piece) {  // a piece of 16 bytes is 4 floats, or all of the chunk
          Word16 word{};
          if (from.is_float) {
            if (r < valid_rows && c + piece * 4 < valid_columns) {
              word = load16(static_cast<const float*>(from.data) + at + piece * 4);
            }
          } else if (piece == 0 && r < valid_rows && c < valid_columns) {
            word = load16(static_cast<const T*>(from.data) + at);
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) raw[q * kChunk + piece * 4 + e] = word.part[e];
        }
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int i = first + static_cast<int>(threadIdx.x) + e * kThreads, r = i >> log_columns, c = i & mask;
        if (i >= count) break;
        raw[e] = 0;
        if (r >= valid_rows || c >= valid_columns) continue;
        const std::int64_t at = (row + r) * from.stride + column + c;
        if constexpr (sizeof(T) == 2) {
          if (!from.is_float) {
            raw[e] = static_cast<const T*>(from.data)[at].bits;
            continue;
          }
        }
        raw[e] = static_cast<const std::uint32_t*>(from.data)[at];
      }
    }
  }

  ARDLORA_DEVICE void store(const Tile<T>& tile, const Operand& from, int rows, int log_columns, int valid_rows,
                            const float* scale, int first = 0) const {
    const int count = rows << log_columns, mask = (1 << log_columns) - 1;
    const auto factor = [&](int r) { return scale != nullptr && r < valid_rows ? scale[r] : 1.0f; };
    if (from.vector) {
#pragma unroll
      for (int q = 0; q < kElements / kChunk; ++q) {
        const int i = first + (static_cast<int>(threadIdx.x) + q * kThreads) * kChunk, r = i >> log_columns,
                  c = i & mask;
        if (i >= count) break;
        const std::uint32_t* v = raw + q * kChunk;
        Word16 out{{v[0], v[1], v[2], v[3]}};
        if constexpr (sizeof(T) == 2) {
          if (from.is_float || scale != nullptr) {
            const float f = factor(r);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float low = from.is_float ? as_float(v[2 * e]) : widen_low<T>(v[e]);
              const float high = from.is_float ? as_float(v[2 * e + 1]) : widen_high<T>(v[e]);
              out.part[e] = pack2<T>(low * f, high * f);
            }
          }
        } else if (scale != nullptr) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out.part[e] = as_bits(as_float(v[e]) * factor(r));
        }
        store16(tile.at(r, c), out);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int i = first + static_cast<int>(threadIdx.x) + e * kThreads, r = i >> log_columns, c = i & mask;
        if (i >= count) break;
        float v = as_float(raw[e]);
        if constexpr (sizeof(T) == 2) {
          if (!from.is_float) v = widen_low<T>(raw[e]);
        }
        *tile.at(r, c) = narrow<T>(v * factor(r));
      }
    }
  }
};

// All of a tile at once.
template <typename T, int kThreads>
ARDLORA_DEVICE void stage(const Tile<T>& tile, const Operand& from, std::int64_t row, std::int64_t column, int rows,
                          int log_columns, int valid_rows, int valid_columns, const float* scale) {
  constexpr int kElements = 2 * Tile<T>::kChunk;
  Staged<T, kThreads, kElements> part;
#pragma unroll 1
  for (int first = 0; first < rows << log_columns; first += kThreads * kElements) {
    part.fetch(from, row, column, rows, log_columns, valid_rows, valid_columns, first);
    part.store(tile, from, rows, log_columns, valid_rows, scale, first);
  }
}

// ---- small accesses to global memory

template <typename Record>
ARDLORA_DEVICE Record load_record(const Word16* at) {
  static_assert(sizeof(Record) == sizeof(Word16));
  const Word16 word = load16(at);
  const auto part = [&](int i) { return static_cast<std::int32_t>(word.part[i]); };
  return {part(0), part(1), part(2), part(3)};
}

// Two neighbouring floats, of which `count` exist.
ARDLORA_DEVICE void store_pair(float* to, float first, float second, int count) {
  struct alignas(8) Pair {
    float part[2];
  };
  if (count >= 2 && reinterpret_cast<std::uintptr_t>(to) % sizeof(Pair) == 0) {
    *reinterpret_cast<Pair*>(to) = {{first, second}};
    return;
  }
  if (count >= 1) to[0] = first;
  if (count >= 2) to[1] = second;
}

// Up to four neighbouring floats, of which `count` exist.
ARDLORA_DEVICE void store_few(float* to, const float* v, int count) {
  if (count >= 4 && reinterpret_cast<std::uintptr_t>(to) % 16 == 0) {
    store16(to, {{as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])}});
    return;
  }
  store_pair(to, v[0], v[1], count);
  store_pair(to + 2, v[2], v[3], count - 2);
}

}  // namespace ardlora::cuda
