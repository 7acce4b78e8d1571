// The three primitives as objects that live for one call: what a factor needs packed, and the work of one thread. An
// operation makes its passes, then runs them in one parallel region: pack, barrier, rows or columns.
#pragma once

#include <vector>

#include "ardlora/lora_linear.h"
#include "cpu/arena.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace ardlora {

// Kept columns of x under dropout: a bitmap for the time of the call. `words` null: no dropout.
struct KeepBits {
  std::uint32_t* words = nullptr;
  std::int64_t stride = 0;  // words of a row

  const std::uint32_t* row(std::int64_t m) const { return words == nullptr ? nullptr : words + m * stride; }
};

KeepBits take_keep_bits(const Dropout& dropout, std::int64_t rows, std::int64_t cols, cpu::Arena::Use& arena);

// A factor as its kernel reads it. Each thread packs a copy of its own where its share of the rows pays for that: a
// line that another core has just written takes longer to come than to be made again.
class Panels {
 public:
  Panels() = default;
  Panels(std::int64_t lanes, std::int64_t rows, int threads, cpu::Arena::Use& arena);
  // Calls fn(item, begin, end, panels) for what this thread has to pack: items' columns in blocks of kPackBlock.
  template <typename Items, typename F>
  void pack(const cpu::Team& team, const Items& items, std::int64_t width, F&& fn) const;
  const void* of(const cpu::Team& team) const { return begin(team); }

 private:
  std::uint32_t* begin(const cpu::Team& team) const { return data_ + (own_ ? team.id * lanes_ : 0); }
  std::uint32_t* data_ = nullptr;
  std::int64_t lanes_ = 0;
  bool own_ = false;
};

// H += scale * row_scale o (X W^T) on a block of rows, dropped columns of X left out.
class ShrinkPass {
 public:
  ShrinkPass(const FactorView& w, const MatrixView& x, bool masked, int threads, cpu::Arena::Use& arena);
  void pack(const cpu::Team& team) const;
  std::int64_t row_bytes() const;  // of x and of its packed copy, if there is one
  void* take_scratch(std::int64_t rows, cpu::Arena::Use& arena) const;
  void run(const cpu::Team& team, std::int64_t begin, std::int64_t end, const KeepBits& keep, const MatrixView& h,
           void* scratch) const;

 private:
  const cpu::ActivationKernels& kernels_;
  FactorView w_;
  MatrixView x_;
  bool packs_rows_;
  std::vector<cpu::RankTile> tiles_;
  Panels panels_;
};

// Y += scale * (row_scale o H) W on a block of rows, dropped columns of Y left out.
class ExpandPass {
 public:
  ExpandPass(const FactorView& w, const MatrixView& y, int threads, cpu::Arena::Use& arena);
  void pack(const cpu::Team& team) const;
  std::int64_t row_bytes() const;
  void* take_scratch(std::int64_t rows, cpu::Arena::Use& arena) const;
  void run(const cpu::Team& team, std::int64_t begin, std::int64_t end, const KeepBits& keep, const MatrixView& h,
           void* scratch) const;

 private:
  const cpu::ActivationKernels& kernels_;
  FactorView w_;
  MatrixView y_;
  std::vector<cpu::ColumnSegment> segments_;
  std::int64_t hidden_cols_ = 0;
  Panels panels_;
};

// dW = scale * row_scale o (H^T X), dropped columns of X left out; rows past the live ones become 0.
class OuterPass {
 public:
  OuterPass(const FactorView& grad, const MatrixView& h, const MatrixView& x, cpu::Arena::Use& arena);
  // Must have seen every row before `run`; ranges begin at even rows.
  void pack(std::int64_t begin, std::int64_t end) const;
  double work() const;
  // The tasks of this thread, when `before` of `total` work lies before this pass.
  void run(const cpu::Team& team, const KeepBits& keep, double before, double total) const;
  // Columns [begin, end) of one segment's rows, begin a multiple of `column_step`.
  void columns(const Segment& s, std::int64_t begin, std::int64_t end, const KeepBits& keep) const;
  static std::int64_t column_step();

 private:
  const cpu::ActivationKernels& kernels_;
  FactorView grad_;
  MatrixView h_;
  MatrixView x_;
  std::uint32_t* pairs_ = nullptr;
  std::int64_t pairs_stride_ = 0;
};

}  // namespace ardlora
