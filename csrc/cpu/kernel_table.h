// One table of kernels per instruction set, chosen once: the best this CPU can run, or what ARDLORA_ISA names.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ardlora/dtype.h"
#include "ardlora/philox.h"
#include "ardlora/unit_table.h"

namespace ardlora::cpu {

// A few ranks of one segment as shrink takes them (kernels/shrink.inl): rows [w_row, w_row + ranks) of the factor,
// padded to vecs * lanes / group, give columns [h_col, h_col + ranks) of H from columns x_col on.
struct RankTile {
  std::int64_t w_row, h_col, x_col, ranks, group, vecs;
  std::int64_t panel;  // lanes before this tile's in the packed factor
};

// One segment as expand takes it (kernels/expand.inl): columns [h_col, h_col + rank) of H times rows [w_row, w_row +
// rank) of the factor go to columns y_col on.
struct ColumnSegment {
  std::int64_t w_row, h_col, y_col, rank;
  std::int64_t hidden;  // first column among the packed rows of H
  std::int64_t panel;   // lanes before this segment's in the packed factor
};

// `keep`: null, or a bitmap of each row's columns, row stride in words. Pointers are at the first of `rows` rows.
struct ShrinkArgs {
  const RankTile* tiles;
  std::int64_t n_tiles;
  const void* panels;
  std::int64_t width;      // of the factor
  const float* row_scale;  // [rows of the factor] or null
  float scale;
  const void* x;  // operands: of the type `ActivationKernels::operand`
  std::int64_t x_stride;
  float* h;  // added to
  std::int64_t h_stride;
  std::int64_t rows;
};

struct HiddenArgs {
  const ColumnSegment* segments;
  std::int64_t n_segments;
  const float* row_scale;  // as above
  float scale;
  const float* h;
  std::int64_t h_stride;
  void* hidden;  // operands
  std::int64_t hidden_stride;
  std::int64_t rows;
};

struct ExpandArgs {
  const ColumnSegment* segments;
  std::int64_t n_segments;
  const void* panels;
  std::int64_t width;
  const void* hidden;  // operands
  std::int64_t hidden_stride;
  void* y;  // added to
  std::int64_t y_stride;
  const std::uint32_t* keep;
  std::int64_t keep_stride;
  std::int64_t rows;
};

// Columns [c_begin, c_end) of one segment's gradient, over all rows.
struct OuterArgs {
  float* dw;  // the segment's first row
  std::int64_t dw_stride;
  std::int64_t rank;
  const float* row_scale;  // of the segment's first row, or null
  float scale;
  const void* h;  // the segment's first column: floats, or what pair_hidden made, one row for each two
  std::int64_t h_stride;
  const void* x;  // the segment's first column
  std::int64_t x_stride;
  const std::uint32_t* keep;
  std::int64_t keep_stride;
  std::int64_t keep_col;  // bit of the segment's first column
  std::int64_t rows;
  std::int64_t c_begin, c_end;
};

// Columns [begin, end) of a factor's rows go into the panels; `begin` is a multiple of kPackBlock.
inline constexpr std::int64_t kPackBlock = 512;
using PackShrinkFn = void (*)(const RankTile&, const void* w, std::int64_t w_stride, std::int64_t width,
                              std::int64_t begin, std::int64_t end, void* panels);
using PackExpandFn = void (*)(const ColumnSegment&, const void* w, std::int64_t w_stride, std::int64_t width,
                              std::int64_t begin, std::int64_t end, void* panels);
using PackRowsFn = void (*)(const void* x, std::int64_t x_stride, const std::uint32_t* keep, std::int64_t keep_stride,
                            std::int64_t rows, std::int64_t cols, void* packed, std::int64_t packed_stride);
using PairHiddenFn = void (*)(const float* h, std::int64_t h_stride, std::int64_t rows, std::int64_t cols,
                              std::uint32_t* pairs, std::int64_t pairs_stride);
// The columns of rows [m_begin, m_end) that dropout keeps; keep is at the first of them, blocks of 128 columns.
using KeepBitsFn = void (*)(const Dropout&, std::int64_t m_begin, std::int64_t m_end, std::int64_t cols,
                            std::uint32_t* keep, std::int64_t keep_stride);
// Of contiguous entries (kernels/importance.inl).
using FiniteFn = float (*)(const void* weight, const void* grad, std::int64_t n);
using ImportanceFn = void (*)(const void* weight, const void* grad, float* sensitivity, float* uncertainty,
                              std::int64_t n, double beta1, double beta2);
using CombinationFn = void (*)(const float* coefficients, const void* rows, std::int64_t count, std::int64_t n,
                               void* out);
using RowDotFn = float (*)(const void* a, const void* b, std::int64_t n);

// The roofline's loops: kPeakChains independent multiply-adds of whole vectors per step; passes over memory.
inline constexpr std::int64_t kPeakChains = 12;
using PeakLoopFn = float (*)(std::int64_t steps);
using StreamReadFn = float (*)(const float* p, std::int64_t n);
using StreamUpdateFn = void (*)(float* p, std::int64_t n);

// The kernels of one type of activations; entries by adapter are null for pairs that check_dtype_pair refuses.
struct ActivationKernels {
  DType operand;       // what products are taken of: bf16 in pairs, or float
  std::int64_t depth;  // of operands in one lane
  PackRowsFn pack_rows;
  PackShrinkFn pack_shrink[kDTypeCount];  // [adapter]
  void (*shrink)(const ShrinkArgs&);
  PackExpandFn pack_expand[kDTypeCount];  // [adapter]
  void (*pack_hidden)(const HiddenArgs&);
  void (*expand)(const ExpandArgs&);
  PairHiddenFn pair_hidden;  // null where outer takes H as it is
  void (*outer)(const OuterArgs&);
};

struct KernelTable {
  const char* name;
  std::uint32_t needs;  // Feature mask
  std::int64_t lanes;   // floats of a vector
  ActivationKernels activation[kDTypeCount];
  KeepBitsFn keep_bits;
  RowDotFn row_dot[kDTypeCount][kDTypeCount];  // [a][b]: of one type, or b float
  CombinationFn add_combination[kDTypeCount];
  FiniteFn importance_finite[kDTypeCount];  // 0, or NaN where an entry of weight * grad is not finite
  ImportanceFn importance_update[kDTypeCount];
  PeakLoopFn fma_loop;
  PeakLoopFn pair_loop;  // of bf16 pairs; null where the instruction set has none
  StreamReadFn stream_read;
  StreamUpdateFn stream_update;
};

const KernelTable& active();
std::vector<std::string> built_isas();      // best first
std::vector<std::string> available_isas();  // those this CPU can run
void set_isa(const std::string& name);      // for tests; "" returns to the default choice

}  // namespace ardlora::cpu
