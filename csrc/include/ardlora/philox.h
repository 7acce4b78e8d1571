// Dropout as a pure function: element (row, column) of x is kept by 16 bits of Philox4x32 with 7 rounds (Salmon et al.,
// SC 2011), key = seed, counter = (column / 128 * 16 + column % 16, row): lane column % 16 of a block of 128 columns
// serves eight of them, 16-bit half (column / 16) % 2 of word (column % 128) / 32. No mask is stored; backward computes
// the same bits again, whatever the tile or the number of threads. Rows that come sorted bring along what stands for
// them in the counter.
#pragma once

#include <cstdint>

namespace ardlora {

struct Dropout {
  std::uint64_t seed = 0;
  std::uint32_t threshold = 0;         // an element is dropped when its 16 bits are below: p = threshold / 65536
  float keep_scale = 1.0f;             // 1 / (1 - p)
  const std::int64_t* rows = nullptr;  // [count] each row's number in the counter, below 2^32, or null: its place
  std::int64_t count = 0;
  const std::uint64_t* seed_at = nullptr;  // where a CUDA kernel reads the seed, so that replays of a graph differ

  bool active() const { return threshold > 0; }
};

Dropout make_dropout(double p, std::uint64_t seed, const std::int64_t* rows = nullptr, std::int64_t count = 0);

}  // namespace ardlora
