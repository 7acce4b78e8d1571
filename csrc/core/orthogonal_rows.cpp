#include "ardlora/orthogonal_rows.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "ardlora/check.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace ardlora {
namespace {

// Orthonormal rows that grow one by one.
class Basis {
 public:
  Basis(std::int64_t most, std::int64_t width)
      : width_(width),
        rows_(std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(most * width))),
        part_(static_cast<std::size_t>(most)) {}

  // Takes `row` in, less what lies in the basis, and returns it with norm 1; null if nothing is left of it.
  const float* add(const float* row) {
    constexpr float kDependent = 1e-5f;  // of the norm: less is rounding
    constexpr float kMuch = 0.7f;        // of the norm: if so much is left, roundings have not grown in it
    float* v = rows_.get() + size_ * width_;
    std::copy(row, row + width_, v);
    const float first = norm(v);
    float before = first, after = first;
    for (int round = 0; round < 2 && size_ > 0; ++round) {  // twice is enough for full accuracy
      for (std::int64_t i = 0; i < size_; ++i) {
        part_[static_cast<std::size_t>(i)] = -dot_(rows_.get() + i * width_, v, width_);
      }
      add_(part_.data(), rows_.get(), size_, width_, v);
      after = norm(v);
      if (after > kMuch * before) break;
      before = after;
    }
    if (!(after > kDependent * first)) return nullptr;
    const float scale = 1.0f / after;
    for (std::int64_t n = 0; n < width_; ++n) v[n] *= scale;
    ++size_;
    return v;
  }

 private:
  float norm(const float* v) const { return std::sqrt(dot_(v, v, width_)); }

  const cpu::RowDotFn dot_ =
      cpu::active().row_dot[static_cast<int>(DType::kFloat32)][static_cast<int>(DType::kFloat32)];
  const cpu::CombinationFn add_ = cpu::active().add_combination[static_cast<int>(DType::kFloat32)];
  std::int64_t width_, size_ = 0;
  std::unique_ptr<float[]> rows_;
  std::vector<float> part_;  // of a row along each of the others
};

std::uint64_t mixed(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Number `place` of a seed's sequence (SplitMix64).
std::uint64_t random_bits(std::uint64_t seed, std::uint64_t place) {
  return mixed(mixed(seed) + (place + 1) * 0x9e3779b97f4a7c15u);
}

// Its first 24 bits as a number, in steps of 2^-23.
float uniform(std::uint64_t bits) {
  return static_cast<float>(static_cast<std::int32_t>(bits >> 40) - (1 << 23)) * 0x1p-23f;
}

// Signs in place of a row that is a sum of the others, as a repeated seed makes it.
void draw_signs(std::uint64_t seed, float* row, std::int64_t width) {
  for (std::int64_t n = 0; n < width; ++n) {
    row[n] = (random_bits(seed, static_cast<std::uint64_t>(n)) >> 63) != 0 ? 1.0f : -1.0f;
  }
}

void start(const NewRows& f) {
  const std::int64_t all = static_cast<std::int64_t>(f.kept.size()) + f.count;
  Basis basis(all, f.width);
  for (const std::int64_t row : f.kept) basis.add(f.others + row * f.width);
  for (std::int64_t row = 0; row < f.count; ++row) {
    float* out = f.rows + row * f.width;
    const float* unit = basis.add(out);
    for (std::uint64_t attempt = 0; unit == nullptr && attempt < 4 && all <= f.width; ++attempt) {
      draw_signs(static_cast<std::uint64_t>(row) * 4 + attempt, out, f.width);
      unit = basis.add(out);
    }
    for (std::int64_t n = 0; unit != nullptr && n < f.width; ++n) out[n] = f.norm * unit[n];
  }
}

}  // namespace

void orthogonal_rows(const std::vector<NewRows>& factors, int threads) {
  double flops = 0.0;
  for (const NewRows& f : factors) {
    ARDLORA_CHECK(f.count >= 0 && f.width >= 0 && f.others_rows >= 0, "orthogonal_rows: sizes must be >= 0, got ",
                  f.count, " new rows of ", f.width, " beside ", f.others_rows);
    ARDLORA_CHECK(f.rows != nullptr || f.count * f.width == 0, "orthogonal_rows: rows must not be null");
    ARDLORA_CHECK(f.others != nullptr || f.others_rows * f.width == 0, "orthogonal_rows: others must not be null");
    for (const std::int64_t row : f.kept) {
      ARDLORA_CHECK(row >= 0 && row < f.others_rows, "orthogonal_rows: kept must be rows of ", f.others_rows, ", got ",
                    row);
    }
    const auto all = static_cast<double>(f.kept.size()) + static_cast<double>(f.count);
    flops += 2.0 * all * all * static_cast<double>(f.width);
  }
  const auto n = static_cast<std::int64_t>(factors.size());
  cpu::parallel_for(n, 1, cpu::useful_threads(threads, flops), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) start(factors[static_cast<std::size_t>(i)]);
  });
}

void draw_uniform(float* out, std::int64_t count, std::uint64_t seed, int threads) {
  ARDLORA_CHECK(count >= 0 && (out != nullptr || count == 0), "draw_uniform: out must hold ", count, " numbers");
  constexpr double kFlopsOfOne = 8.0;
  const int used = cpu::useful_threads(threads, kFlopsOfOne * static_cast<double>(count));
  cpu::parallel_for(count, 1024, used, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) out[i] = uniform(random_bits(seed, static_cast<std::uint64_t>(i)));
  });
}

}  // namespace ardlora
