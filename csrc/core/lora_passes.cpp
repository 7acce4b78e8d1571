#include "core/lora_passes.h"

#include <cstring>

namespace ardlora {
namespace {

using cpu::Arena;
using cpu::kPackBlock;
using cpu::Team;

const cpu::ActivationKernels& kernels_for(const MatrixView& activations) {
  return cpu::active().activation[static_cast<int>(activations.dtype)];
}

constexpr std::int64_t kOwnRows = 64;  // of each thread, for panels of its own

std::int64_t ceil_to(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }

const char* element(const MatrixView& m, std::int64_t row, std::int64_t col) {
  return static_cast<const char*>(m.data) + (row * m.row_stride + col) * dtype_size(m.dtype);
}

char* element(MatrixView& m, std::int64_t row, std::int64_t col) {
  return static_cast<char*>(m.data) + (row * m.row_stride + col) * dtype_size(m.dtype);
}

// A vector of lanes for each rank, a quarter of one for the narrow rows of heads. One size for all ranks: a component's
// sum must not depend on how many others there are, or a rank that grows by a component without effect would move the
// last bit of the output. Only how many vectors a tile has, up to four, fits the rank.
std::vector<cpu::RankTile> rank_tiles(const Factor& f, std::int64_t lanes, std::int64_t depth, std::int64_t* total) {
  constexpr std::int64_t kNarrow = 256, kMostVecs = 4;
  const std::int64_t group = f.width > kNarrow ? lanes : std::max<std::int64_t>(lanes / 4, 1);
  const std::int64_t per_vec = lanes / group, step = group * depth;
  std::vector<cpu::RankTile> tiles;
  *total = 0;
  for (const Segment& s : f.segments) {
    for (std::int64_t j = 0; j < s.rank;) {
      std::int64_t vecs = 1;
      while (vecs < kMostVecs && vecs * per_vec < s.rank - j) vecs *= 2;
      const std::int64_t ranks = std::min(s.rank - j, vecs * per_vec);
      tiles.push_back({s.w_begin + j, s.h_begin + j, s.col_begin, ranks, group, vecs, *total});
      *total += (f.width + step - 1) / step * vecs * lanes;
      j += ranks;
    }
  }
  return tiles;
}

}  // namespace

Panels::Panels(std::int64_t lanes, std::int64_t rows, int threads, Arena::Use& arena)
    : lanes_(ceil_to(lanes, 16)), own_(rows >= kOwnRows * threads) {
  data_ = arena.take<std::uint32_t>(own_ ? lanes_ * threads : lanes_);
}

template <typename Items, typename F>
void Panels::pack(const Team& team, const Items& items, std::int64_t width, F&& fn) const {
  const std::int64_t blocks = (width + kPackBlock - 1) / kPackBlock;
  const cpu::Range part = (own_ ? Team{} : team).share(static_cast<std::int64_t>(items.size()) * blocks, 1);
  for (std::int64_t i = part.begin; i < part.end; ++i) {
    const std::int64_t from = i % blocks * kPackBlock;
    fn(items[static_cast<std::size_t>(i / blocks)], from, std::min(width, from + kPackBlock), begin(team));
  }
}

KeepBits take_keep_bits(const Dropout& dropout, std::int64_t rows, std::int64_t cols, Arena::Use& arena) {
  if (!dropout.active()) return {};
  constexpr std::int64_t kSpare = 2;                             // kernels read 64 bits at once
  const std::int64_t stride = ceil_to(cols, 128) / 32 + kSpare;  // in the row itself: the next may be another thread's
  return {arena.take<std::uint32_t>(rows * stride), stride};
}

ShrinkPass::ShrinkPass(const FactorView& w, const MatrixView& x, bool masked, int threads, Arena::Use& arena)
    : kernels_(kernels_for(x)), w_(w), x_(x), packs_rows_(masked || kernels_.operand != x.dtype) {
  std::int64_t lanes;
  tiles_ = rank_tiles(*w.factor, cpu::active().lanes, kernels_.depth, &lanes);
  panels_ = Panels(lanes, x.rows, threads, arena);
}

void ShrinkPass::pack(const Team& team) const {
  const auto pack = kernels_.pack_shrink[static_cast<int>(w_.weight.dtype)];
  panels_.pack(team, tiles_, w_.factor->width, [&](const cpu::RankTile& t, auto begin, auto end, void* panels) {
    pack(t, w_.weight.data, w_.weight.row_stride, w_.factor->width, begin, end, panels);
  });
}

std::int64_t ShrinkPass::row_bytes() const {
  return x_.cols * (dtype_size(x_.dtype) + (packs_rows_ ? dtype_size(kernels_.operand) : 0));
}

void* ShrinkPass::take_scratch(std::int64_t rows, Arena::Use& arena) const {
  return packs_rows_ ? arena.take<char>(rows * ceil_to(x_.cols, 32) * dtype_size(kernels_.operand)) : nullptr;
}

void ShrinkPass::run(const Team& team, std::int64_t begin, std::int64_t end, const KeepBits& keep, const MatrixView& h,
                     void* scratch) const {
  float* hp = static_cast<float*>(h.data) + begin * h.row_stride;
  const bool whole = h.row_stride == h.cols;  // then rows follow each other, and are one piece
  const std::int64_t pieces = whole ? 1 : end - begin, length = whole ? (end - begin) * h.cols : h.cols;
  for (std::int64_t m = 0; length > 0 && m < pieces; ++m) {
    std::memset(hp + m * h.row_stride, 0, static_cast<std::size_t>(length) * sizeof(float));
  }
  const void* x = element(x_, begin, 0);
  std::int64_t x_stride = x_.row_stride;
  if (packs_rows_) {
    const std::int64_t stride = ceil_to(x_.cols, 32);
    kernels_.pack_rows(x, x_stride, keep.row(begin), keep.stride, end - begin, x_.cols, scratch, stride);
    x = scratch;
    x_stride = stride;
  }
  kernels_.shrink({tiles_.data(), static_cast<std::int64_t>(tiles_.size()), panels_.of(team), w_.factor->width,
                   w_.row_scale, w_.scale, x, x_stride, hp, h.row_stride, end - begin});
}

ExpandPass::ExpandPass(const FactorView& w, const MatrixView& y, int threads, Arena::Use& arena)
    : kernels_(kernels_for(y)), w_(w), y_(y) {
  const std::int64_t lanes = cpu::active().lanes;
  std::int64_t panel = 0;
  for (const Segment& s : w.factor->segments) {
    segments_.push_back({s.w_begin, s.h_begin, s.col_begin, s.rank, hidden_cols_, panel});
    const std::int64_t steps = (s.rank + kernels_.depth - 1) / kernels_.depth;
    panel += steps * ceil_to(w.factor->width, kernels_.depth * lanes);
    hidden_cols_ += steps * kernels_.depth;
  }
  panels_ = Panels(panel, y.rows, threads, arena);
}

void ExpandPass::pack(const Team& team) const {
  const auto pack = kernels_.pack_expand[static_cast<int>(w_.weight.dtype)];
  panels_.pack(team, segments_, w_.factor->width, [&](const cpu::ColumnSegment& s, auto begin, auto end, void* panels) {
    pack(s, w_.weight.data, w_.weight.row_stride, w_.factor->width, begin, end, panels);
  });
}

std::int64_t ExpandPass::row_bytes() const { return y_.cols * dtype_size(y_.dtype); }

void* ExpandPass::take_scratch(std::int64_t rows, Arena::Use& arena) const {
  return arena.take<char>(rows * hidden_cols_ * dtype_size(kernels_.operand));
}

void ExpandPass::run(const Team& team, std::int64_t begin, std::int64_t end, const KeepBits& keep, const MatrixView& h,
                     void* scratch) const {
  const float* hp = static_cast<const float*>(h.data) + begin * h.row_stride;
  const auto n = static_cast<std::int64_t>(segments_.size());
  kernels_.pack_hidden(
      {segments_.data(), n, w_.row_scale, w_.scale, hp, h.row_stride, scratch, hidden_cols_, end - begin});
  MatrixView y = y_;
  kernels_.expand({segments_.data(), n, panels_.of(team), w_.factor->width, scratch, hidden_cols_, element(y, begin, 0),
                   y_.row_stride, keep.row(begin), keep.stride, end - begin});
}

OuterPass::OuterPass(const FactorView& grad, const MatrixView& h, const MatrixView& x, Arena::Use& arena)
    : kernels_(kernels_for(x)), grad_(grad), h_(h), x_(x) {
  if (kernels_.pair_hidden == nullptr) return;
  pairs_stride_ = ceil_to(h.cols, cpu::active().lanes);
  pairs_ = arena.take<std::uint32_t>((h.rows + 1) / 2 * pairs_stride_);
}

void OuterPass::pack(std::int64_t begin, std::int64_t end) const {
  if (pairs_ == nullptr) return;
  kernels_.pair_hidden(static_cast<const float*>(h_.data) + begin * h_.row_stride, h_.row_stride, end - begin, h_.cols,
                       pairs_ + begin / 2 * pairs_stride_, pairs_stride_);
}

double OuterPass::work() const {
  return static_cast<double>(grad_.factor->rows) * static_cast<double>(grad_.factor->width);
}

void OuterPass::run(const Team& team, const KeepBits& keep, double before, double total) const {
  const Factor& f = *grad_.factor;
  float* dw = static_cast<float*>(grad_.weight.data);
  const cpu::Range past = team.share(grad_.weight.rows - f.rows, 1);
  for (std::int64_t r = f.rows + past.begin; r < f.rows + past.end; ++r) {
    std::memset(dw + r * grad_.weight.row_stride, 0, static_cast<std::size_t>(f.width) * sizeof(float));
  }
  // Blocks of x stay in L1 for all ranks; few ranks pass over it once anyway.
  const std::int64_t step = column_step();
  for (const Segment& s : f.segments) {
    const std::int64_t limit = s.rank <= 8 ? 512 : 128;
    const std::int64_t block = std::clamp(ceil_to((f.width + team.size - 1) / team.size, step), step, limit);
    for (std::int64_t c = 0; c < f.width; c += block) {
      const std::int64_t end = std::min(f.width, c + block);
      const bool mine = team.owns(before, total);
      before += static_cast<double>(s.rank) * static_cast<double>(end - c);
      if (mine) columns(s, c, end, keep);
    }
  }
}

std::int64_t OuterPass::column_step() { return 4 * cpu::active().lanes; }

void OuterPass::columns(const Segment& s, std::int64_t begin, std::int64_t end, const KeepBits& keep) const {
  const void* h =
      pairs_ != nullptr ? static_cast<const void*>(pairs_ + s.h_begin) : static_cast<const float*>(h_.data) + s.h_begin;
  kernels_.outer({static_cast<float*>(grad_.weight.data) + s.w_begin * grad_.weight.row_stride, grad_.weight.row_stride,
                  s.rank, grad_.row_scale == nullptr ? nullptr : grad_.row_scale + s.w_begin, grad_.scale, h,
                  pairs_ != nullptr ? pairs_stride_ : h_.row_stride, element(x_, 0, s.col_begin), x_.row_stride,
                  keep.row(0), keep.stride, s.col_begin, x_.rows, begin, end});
}

}  // namespace ardlora
