// The ways between global memory and the tiles of mma_tile.cuh: activations and H by cp.async, factors through
// registers, where they meet their gates and are rounded, and sums on their way out. Rows and columns past the end
// become zero.
#pragma once

#include "cuda/mma_tile.cuh"

namespace ardlora::cuda {

// A matrix of T in global memory, as a kernel argument. `vector`: rows, and what a tile takes of them, begin at
// multiples of 16 bytes.
struct Activations {
  void* data;
  std::int64_t stride;
  std::int32_t rows;
  bool vector;
};

// Chunk by chunk, in flight until cp_async_wait.
template <typename T, int kThreads, int kRows>
ARDLORA_DEVICE void copy_chunks(const Tile<T>& tile, const Activations& x, int row, int column, int log_columns,
                                int end) {
  constexpr int kChunk = Tile<T>::kChunk, kPanel = Tile<T>::kPanel, kLogChunk = Tile<T>::kLogChunk,
                kLogPanel = kLogChunk + 3;
  const int log_chunks = (log_columns < kLogPanel ? log_columns : kLogPanel) - kLogChunk;  // of a panel's row
  const int apart = (kThreads / 8 >> log_chunks) * 8;  // rows; a multiple of 8, after which chunks lie as before
  const int c = (static_cast<int>(threadIdx.x) & ((1 << log_chunks) - 1)) * kChunk;
  const int r = static_cast<int>(threadIdx.x) >> log_chunks;
  const std::uint32_t to = tile.address(r, c);
  const T* const data = static_cast<const T*>(x.data);
  const T* const first = data + (row + r) * x.stride + column + c;
  const bool inside = row + kRows <= x.rows && column + (1 << log_columns) <= end;
#pragma unroll
  for (int panel = 0; panel << kLogPanel < 1 << log_columns; ++panel) {
    const T* from = first + panel * kPanel;
    const std::uint32_t panel_to = to + static_cast<std::uint32_t>(panel * tile.rows * kPanelBytes);
    if (inside) {
#pragma unroll
      for (int i = 0; i < kRows; i += apart, from += apart * x.stride) cp_async16(panel_to + i * kPanelBytes, from);
      continue;
    }
    const int left = end - column - c - panel * kPanel;
    const int bytes = (left < 0 ? 0 : (left < kChunk ? left : kChunk)) * static_cast<int>(sizeof(T));
#pragma unroll 1
    for (int i = 0; i < kRows; i += apart, from += apart * x.stride) {
      const int valid = row + r + i < x.rows ? bytes : 0;
      cp_async16(panel_to + i * kPanelBytes, valid > 0 ? from : data, valid);
    }
  }
}

// Element by element, from rows that begin anywhere.
template <typename T, int kThreads, int kRows>
ARDLORA_DEVICE void copy_elements(const Tile<T>& tile, const Activations& x, int row, int column, int log_columns,
                                  int end) {
  constexpr int kAhead = 2048 / kThreads;  // loads in flight
  const int c = static_cast<int>(threadIdx.x) & ((1 << log_columns) - 1), apart = kThreads >> log_columns;
  const T* const from = static_cast<const T*>(x.data) + row * x.stride + column + c;
#pragma unroll 1
  for (int r = static_cast<int>(threadIdx.x) >> log_columns; r < kRows; r += kAhead * apart) {
    T v[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int m = r + i * apart;
      v[i] = m < kRows && row + m < x.rows && column + c < end ? from[m * x.stride] : narrow<T>(0.0f);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (r + i * apart < kRows) *tile.at(r + i * apart, c) = v[i];
    }
  }
}

// Starts copying rows [row, row + kRows) and columns [column, column + 2^log_columns), of which columns before `end`
// exist; the rest becomes zero. Complete after the thread's cp_async_wait and a barrier.
template <typename T, int kThreads, int kRows>
ARDLORA_DEVICE void copy_async(const Tile<T>& tile, const Activations& x, int row, int column, int log_columns,
                               int end) {
  if (x.vector) {
    copy_chunks<T, kThreads, kRows>(tile, x, row, column, log_columns, end);
  } else {
    copy_elements<T, kThreads, kRows>(tile, x, row, column, log_columns, end);
  }
}

// A factor's weight, float or T, that becomes T on its way.
struct Operand {
  const void* data;
  std::int64_t stride;
  bool is_float;  // else the activations' type
  bool vector;    // every 16-byte chunk lies at a multiple of 16 bytes and wholly inside or wholly outside the matrix
};

enum class Staging {
  kPlain,
  kInterleaved,  // columns in the order of `interleaved`
};

// Where column c lies so that the two columns a lane has of each of kChunk / 2 neighbouring products are one chunk:
// those of lane l of a group of four are [l * kChunk, (l + 1) * kChunk).
template <typename T>
ARDLORA_DEVICE int interleaved(int c) {
  constexpr int kChunk = Tile<T>::kChunk;
  return c / (4 * kChunk) * (4 * kChunk) + c % kChunk / 2 * 8 + c / kChunk % 4 * 2 + c % 2;
}

// Which rows of a tile exist.
struct ValidRows {
  int begin, count;

  ARDLORA_DEVICE ValidRows(int begin_row, int end_row)
      : begin(begin_row), count(end_row > begin_row ? end_row - begin_row : 0) {}
  ARDLORA_DEVICE bool have(int row) const { return static_cast<unsigned>(row - begin) < static_cast<unsigned>(count); }
};

// A tile of `rows` x 2^log_columns on its way through registers: `fetch` issues the loads, `store` waits for them,
// converts, multiplies row r with scale[r] (null: 1) and writes. What lies outside valid rows and columns becomes zero.
// A thread takes four floats, a chunk of T or a single element at a time, down a column of the tile.
template <typename T, int kThreads, int kElements, Staging kStaging = Staging::kPlain>
struct Staged {
  static constexpr int kChunk = Tile<T>::kChunk, kWords = kElements / 4;
  std::uint32_t raw[kElements];
  float factor[kWords];

  struct Place {
    int row, column, rows;  // of the thread's first item; rows between its items

    ARDLORA_DEVICE Place(int item, int log_columns)
        : row((static_cast<int>(threadIdx.x) * item) >> log_columns),
          column(static_cast<int>(threadIdx.x) * item & ((1 << log_columns) - 1)),
          rows((kThreads * item) >> log_columns) {}
  };
  ARDLORA_DEVICE static int item(const Operand& from) { return !from.vector ? 1 : (from.is_float ? 4 : kChunk); }
  // Rows between vectors, a multiple of 8 that the compiler sees as one: after it chunks lie as before.
  ARDLORA_DEVICE static int apart(int item, int log_columns) { return (kThreads * item / 8 >> log_columns) * 8; }

  ARDLORA_DEVICE void fetch(const Operand& from, std::int64_t row, std::int64_t column, int rows, int log_columns,
                            ValidRows valid, int valid_columns, const float* scale) {
    const Place at(item(from), log_columns);
    const int bytes = from.is_float ? 4 : static_cast<int>(sizeof(T));
    const auto* p =
        static_cast<const unsigned char*>(from.data) + ((row + at.row) * from.stride + column + at.column) * bytes;
    if (valid.begin + valid.count > rows) valid.count = rows - valid.begin;
    if (at.column >= valid_columns) valid.count = 0;
    if (from.vector) {
      const int between = apart(item(from), log_columns);
      const std::int64_t step = between * from.stride * bytes;
#pragma unroll
      for (int q = 0; q < kWords; ++q) {
        if (q * between >= rows) break;
        const int r = at.row + q * between;
        Word16 word{};
        factor[q] = 1.0f;
        if (valid.have(r)) {
          word = load16(p + q * step);
          if (scale != nullptr) factor[q] = scale[r];
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) raw[4 * q + e] = word.part[e];
      }
    } else {
      const std::int64_t step = at.rows * from.stride * bytes;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        raw[e] = 0;
        if (!valid.have(at.row + e * at.rows)) continue;
        if (bytes == 4) {
          raw[e] = *reinterpret_cast<const std::uint32_t*>(p + e * step);
        } else {
          raw[e] = *reinterpret_cast<const std::uint16_t*>(p + e * step);
        }
      }
    }
  }

  ARDLORA_DEVICE void store(const Tile<T>& tile, const Operand& from, int rows, int log_columns, ValidRows valid,
                            const float* scale) {
    const Place at(item(from), log_columns);
    const int column = kStaging == Staging::kInterleaved ? interleaved<T>(at.column) : at.column;
    if (from.vector) {
      const int between = apart(item(from), log_columns), offset = tile.offset(at.row, column);
#pragma unroll
      for (int q = 0; q < kWords; ++q) {
        if (q * between >= rows) break;
        if (at.row + q * between >= rows) continue;
        unsigned char* const to = tile.data + q * between * kPanelBytes;
        const std::uint32_t* const v = raw + 4 * q;
        const auto value = [&](int e) { return factor[q] * as_float(v[e]); };
        if constexpr (sizeof(T) == 4) {
          put<4>(to, offset, {{as_bits(value(0)), as_bits(value(1)), as_bits(value(2)), as_bits(value(3))}});
        } else if (from.is_float) {
          put<2>(to, offset, {{pack2<T>(value(0), value(1)), pack2<T>(value(2), value(3))}});
        } else if (scale == nullptr) {
          put<4>(to, offset, {{v[0], v[1], v[2], v[3]}});
        } else {
          Word16 out;
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            out.part[e] = pack2<T>(factor[q] * widen_low<T>(v[e]), factor[q] * widen_high<T>(v[e]));
          }
          put<4>(to, offset, out);
        }
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int r = at.row + e * at.rows;
        if (r >= rows) continue;
        float v = as_float(raw[e]);
        if constexpr (sizeof(T) == 2) {
          if (!from.is_float) v = widen_low<T>(raw[e]);
        }
        *tile.at(r, column) = narrow<T>(scale != nullptr && valid.have(r) ? v * scale[r] : v);
      }
    }
  }

 private:
  // Writes the first kCount words at an offset of Tile, pair by pair where columns are interleaved.
  template <int kCount>
  ARDLORA_DEVICE static void put(unsigned char* to, int offset, const Word16& words) {
    const std::uint32_t* const w = words.part;
    constexpr int kPerPair = sizeof(T) / 2, kPairs = kCount / kPerPair, kApart = 8 * sizeof(T);
    if constexpr (kStaging == Staging::kPlain) {
      if constexpr (kCount == 2) {
        store8(to + offset, w[0], w[1]);
      } else {
        store16(to + offset, words);
      }
    } else if constexpr (kPerPair == 1) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) *reinterpret_cast<std::uint32_t*>(to + (offset ^ i * kApart)) = w[i];
    } else {  // half of a row's lanes, whose panel lies on the same banks, begins with the other pair
      const bool swap = threadIdx.x % 16 >= 8;
      store8(to + (offset ^ (swap ? kApart : 0)), swap ? w[2] : w[0], swap ? w[3] : w[1]);
      store8(to + (offset ^ (swap ? 0 : kApart)), swap ? w[0] : w[2], swap ? w[1] : w[3]);
    }
  }
};

// Starts copying a tile of a prepared factor (prepare.cuh): rows [row, row + kRows), of which the valid ones exist, and
// kColumns columns, all of which do. The rest becomes zero.
template <typename T, int kThreads, int kRows, int kColumns>
ARDLORA_DEVICE void copy_factor(const Tile<T>& tile, const Operand& from, std::int64_t row, std::int64_t column,
                                ValidRows valid) {
  constexpr int kApart = kThreads / 8;  // rows; a multiple of 8, after which chunks lie as before
  static_assert(kApart % 8 == 0 && kRows % kApart == 0 && kColumns % Tile<T>::kPanel == 0);
  const int r = static_cast<int>(threadIdx.x) / 8, c = static_cast<int>(threadIdx.x) % 8 * Tile<T>::kChunk;
  const std::uint32_t to = tile.address(r, c);
  const T* const first = static_cast<const T*>(from.data) + (row + r) * from.stride + column + c;
#pragma unroll
  for (int panel = 0; panel < kColumns / Tile<T>::kPanel; ++panel) {
    const T* at = first + panel * Tile<T>::kPanel;
#pragma unroll
    for (int i = 0; i < kRows; i += kApart, at += kApart * from.stride) {
      const bool is = valid.have(r + i);
      cp_async16(to + (panel * kRows + i) * kPanelBytes, is ? at : static_cast<const T*>(from.data), is ? 16 : 0);
    }
  }
}

template <typename Record>
ARDLORA_DEVICE Record load_record(const Record* at) {
  static_assert(sizeof(Record) == sizeof(Word16));
  const Word16 word = load16(at);
  const auto part = [&](int i) { return static_cast<std::int32_t>(word.part[i]); };
  return {part(0), part(1), part(2), part(3)};
}

// Two neighbouring floats, of which `count` exist.
ARDLORA_DEVICE void store_pair(float* to, float first, float second, int count) {
  if (count >= 2 && reinterpret_cast<std::uintptr_t>(to) % 8 == 0) {
    store8(to, as_bits(first), as_bits(second));
    return;
  }
  if (count >= 1) to[0] = first;
  if (count >= 2) to[1] = second;
}

// A warp writes `count` rows of up to 2^log_columns elements, which lie at `at(row, column)` in shared memory;
// `columns` of them exist. Neighbouring lanes write neighbouring addresses, wherever rows begin.
template <typename T, typename At>
ARDLORA_DEVICE void store_rows(T* to, std::int64_t stride, int count, int log_columns, int columns, const At& at) {
  constexpr int kChunk = Tile<T>::kChunk, kLogChunk = Tile<T>::kLogChunk;
  const bool chunks = reinterpret_cast<std::uintptr_t>(to) % 16 == 0 && stride % kChunk == 0 && columns % kChunk == 0;
  const int log_items = chunks ? log_columns - kLogChunk : log_columns, log_lanes = log_items < 5 ? log_items : 5;
  const int size = chunks ? kChunk : 1, first = lane_id() >> log_lanes, apart = 32 >> log_lanes;  // rows
#pragma unroll 1
  for (int item = lane_id() & ((1 << log_lanes) - 1); item * size < columns; item += 32) {
    T* p = to + first * stride + item * size;
#pragma unroll 1
    for (int row = first; row < count; row += apart, p += apart * stride) {
      if (chunks) {
        store16(p, load16(at(row, item * kChunk)));
      } else {
        *p = *at(row, item);
      }
    }
  }
}

// Two neighbouring elements of a tile.
template <typename T>
ARDLORA_DEVICE void put_pair(T* to, float first, float second) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<std::uint32_t*>(to) = pack2<T>(first, second);
  } else {
    store8(to, as_bits(first), as_bits(second));
  }
}

}  // namespace ardlora::cuda
