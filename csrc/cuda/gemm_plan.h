// Tile sizes of the GEMM kernels, and how a launch is cut: everything a launcher decides, in one printable value.
#pragma once

#include <cstdint>
#include <string>

#include "ardlora/dtype.h"
#include "ardlora/unit_table.h"
#include "core/host_device.h"

namespace ardlora::cuda {

inline constexpr int kPanelBytes = 128;  // a tile's row in shared memory (mma_tile.cuh)
inline constexpr int kRankTile = 64;     // ranks that a block holds at once

inline constexpr int kSeedBytes = 128;  // before the tiles: the seed of a block's dropout (dropout.cuh)

inline constexpr int kShrinkRows = 128;
inline constexpr int kShrinkThreads = 128;
inline constexpr int kShrinkStages = 2;

// More ranks than kRankTile, 16-bit activations and rows enough to pay for it: the factor is prepared once for the call
// (prepare.cuh), `shrink` holds kWideRanks at once and `expand` both halves of its columns.
inline constexpr int kWideRanks = 128;
inline constexpr int kWideThreads = 256;
inline constexpr int kWideRows = 12;          // for each multiprocessor, at least
inline constexpr int kPreparedColumns = 128;  // a prepared factor's width is a multiple of it

inline constexpr int kExpandRows = 128;
inline constexpr int kExpandColumns = 128;
inline constexpr int kExpandHalf = kExpandColumns / 2;
inline constexpr int kExpandThreads = 256;
// Dropout: a row's bits for two blocks of 128 columns, and a word more so that rows lie on different banks.
inline constexpr int kExpandMaskStride = 2 * 128 / 8 + 4;
inline constexpr int kExpandMaskBytes = kExpandRows * kExpandMaskStride;

inline constexpr int kOuterColumns = 128;
inline constexpr int kOuterThreads = 128;
inline constexpr int kOuterStages = 3;
inline constexpr int kOnePassRanks = 16;  // most ranks of outer_shrink

ARDLORA_HOST_DEVICE constexpr int outer_rows(int element_bytes) { return 128 / element_bytes; }  // of a step: 16 KiB

ARDLORA_HOST_DEVICE constexpr int tile_bytes(int element_bytes, int rows, int columns) {
  return (columns * element_bytes + kPanelBytes - 1) / kPanelBytes * rows * kPanelBytes;
}

constexpr std::int64_t prepared_stride(std::int64_t width) {
  return (width + kPreparedColumns - 1) / kPreparedColumns * kPreparedColumns;
}

// Bytes of dynamic shared memory.
constexpr int shrink_shared(int w_rows) {
  return (kShrinkStages * kShrinkRows + 2 * w_rows) * kPanelBytes + kSeedBytes;
}

constexpr int expand_shared(int element_bytes, int rank_tile, int h_tiles, bool dropout, bool wide = false) {
  return 2 * tile_bytes(element_bytes, rank_tile, wide ? kExpandColumns : kExpandHalf) +
         h_tiles * tile_bytes(element_bytes, kExpandRows, rank_tile) + (dropout ? kExpandMaskBytes + kSeedBytes : 0);
}

constexpr int outer_shared(int element_bytes, int rank_tile) {
  const int rows = outer_rows(element_bytes);
  return kSeedBytes +
         kOuterStages * (tile_bytes(element_bytes, rows, kOuterColumns) + tile_bytes(element_bytes, rows, rank_tile));
}

constexpr int outer_shrink_shared(int element_bytes, int rank_tile) {
  const int hidden_rows = outer_rows(element_bytes) * (kOnePassRanks * element_bytes + 16);
  return outer_shared(element_bytes, rank_tile) + tile_bytes(element_bytes, kOnePassRanks, kOuterColumns) + hidden_rows;
}

enum class Gemm { kShrink, kExpand, kOuter, kOuterShrink };

struct GemmPlan {
  Gemm kind;
  unsigned blocks[3];  // one of them 0: nothing to do
  unsigned threads;
  int shared;                   // bytes
  int rank_tile;                // ranks that a block holds at once: 16, 32, 64 or, in a wide shrink, 128
  int tiles;                    // rank tiles of a group (shrink) or column tiles of a segment
  int shares;                   // parts of the summed dimension; more than one: partial sums go to the workspace
  int share;                    // its length: steps (shrink) or rows
  int sums;                     // of sorted rows: experts with several shares, at most
  std::int64_t partial_rows;    // of a share
  std::int64_t partial_stride;  // floats
  std::int64_t hidden_rows;     // outer_shrink: of a column tile's partial sums of dH
  std::int64_t hidden_stride;   // floats
  std::int64_t prepared;        // floats of the prepared factor; 0 where blocks are not wide

  bool wide() const { return prepared > 0; }
  std::int64_t workspace() const { return partial() + hidden_partial() + prepared; }  // floats
  std::int64_t partial() const { return shares > 1 ? shares * partial_rows * partial_stride : 0; }
  std::int64_t hidden_partial() const { return tiles > 1 ? tiles * hidden_rows * hidden_stride : 0; }
};

// Of the device that a launch is for.
struct Multiprocessors {
  int count;
  int shared;  // bytes of each
};

// `hidden`: columns of H. `sorted`: the factor is of experts, and rows come sorted by expert, who knows how many for
// each (row_blocks.cuh): there are blocks for the worst case, along x, for `outer` along z.
GemmPlan plan_gemm(Gemm kind, const Factor& factor, std::int64_t hidden, std::int64_t rows, DType activations,
                   bool dropout, const Multiprocessors& device, bool sorted = false);

// Whether one pass over dy makes dH and dB, instead of a shrink and an outer. Its parts of dH are 4 bytes a rank for
// each 128 columns of dy, written and read again: from 32 ranks on that is more than reading dy twice. Units that share
// columns of H, and float32, which is there for precision, keep two passes.
bool one_pass(const Factor& factor, std::int64_t hidden, std::int64_t rows, DType activations);

std::string describe(const GemmPlan& plan);

// All launches of an adapter's calls on `rows` rows: made once for these, and good for every device like `device`.
struct LoraPlans {
  std::int64_t rows;
  DType activations;
  bool dropout;
  bool at_once;  // outer_b is an outer_shrink, and shrink_b is not launched
  GemmPlan shrink_a, expand_b;
  GemmPlan shrink_b, outer_b, expand_a, outer_a;
  std::int64_t workspace;  // bytes that either call may need
};

}  // namespace ardlora::cuda
