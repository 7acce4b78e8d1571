// One table of kernels per instruction set, chosen once: the best this CPU can run, or what ARDLORA_ISA names.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ardlora/dtype.h"
#include "ardlora/philox.h"
#include "ardlora/unit_table.h"

namespace ardlora::cpu {

// A factor as a kernel sees it: no checks, everything by value or pointer.
struct KernelFactor {
  const Segment* segments;
  std::int64_t n_segments;
  std::int64_t width;
  void* weight;  // [rows, width]; outer writes it as float
  std::int64_t w_stride;
  const float* row_scale;  // [rows] or null
  float scale;
};

// Rows of activations a kernel keeps in registers at once; scratch for expand is kMaxRowTile * max_rank floats.
inline constexpr std::int64_t kMaxRowTile = 8;
// outer works on blocks of this many columns of one segment.
inline constexpr std::int64_t kOuterBlock = 128;

// H rows [m_begin, m_end) = shrink(X rows); H columns of no segment stay untouched, so the caller clears them.
using ShrinkFn = void (*)(const KernelFactor&, const void* x, std::int64_t x_stride, float* h, std::int64_t h_stride,
                          std::int64_t m_begin, std::int64_t m_end);
using ExpandFn = void (*)(const KernelFactor&, const float* h, std::int64_t h_stride, void* y, std::int64_t y_stride,
                          std::int64_t m_begin, std::int64_t m_end, float* scratch);
// Columns [c_begin, c_end) of one segment's rows of dW, over all M rows.
using OuterFn = void (*)(const KernelFactor&, const Segment&, const float* h, std::int64_t h_stride, const void* x,
                         std::int64_t x_stride, std::int64_t rows, std::int64_t c_begin, std::int64_t c_end);
// Dropout of a block: copy rows [m_begin, m_end) x columns [c_begin, c_end) of x as float; add whole rows into y.
using DropoutCopyFn = void (*)(const Dropout&, const void* x, std::int64_t x_stride, float* dst,
                               std::int64_t dst_stride, std::int64_t m_begin, std::int64_t m_end, std::int64_t c_begin,
                               std::int64_t c_end);
using DropoutAddFn = void (*)(const Dropout&, const float* src, std::int64_t src_stride, void* y, std::int64_t y_stride,
                              std::int64_t m_begin, std::int64_t m_end, std::int64_t cols);
using RowDotFn = float (*)(const void* a, const void* b, std::int64_t n);

// The roofline's loops: kPeakChains independent multiply-adds of whole vectors per step; passes over memory.
inline constexpr std::int64_t kPeakChains = 12;
using PeakLoopFn = float (*)(std::int64_t steps);
using StreamReadFn = float (*)(const float* p, std::int64_t n);
using StreamUpdateFn = void (*)(float* p, std::int64_t n);

struct KernelTable {
  const char* name;
  std::uint32_t needs;                        // Feature mask
  ShrinkFn shrink[kDTypeCount][kDTypeCount];  // [activation][adapter]
  ExpandFn expand[kDTypeCount][kDTypeCount];
  OuterFn outer[kDTypeCount];  // [activation]; dW is float
  DropoutCopyFn dropout_copy[kDTypeCount];
  DropoutAddFn dropout_add[kDTypeCount];
  RowDotFn row_dot[kDTypeCount][kDTypeCount];  // [a][b]: of one type, or b float
  std::int64_t lanes;                          // floats of a vector
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
