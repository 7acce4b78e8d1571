#include "ardlora/orthogonal_rows.h"

#include <algorithm>
#include <cmath>

#include "ardlora/check.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace ardlora {
namespace {

// Orthonormal rows that grow one by one.
class Basis {
 public:
  Basis(std::int64_t most, std::int64_t width)
      : width_(width), rows_(static_cast<std::size_t>(most * width)), part_(static_cast<std::size_t>(most)) {}

  // Takes `row` in, less what lies in the basis, and returns it with norm 1; null if nothing is left of it.
  const float* add(const float* row) {
    constexpr float kDependent = 1e-5f;  // of the norm: less is rounding
    float* v = rows_.data() + size_ * width_;
    std::copy(row, row + width_, v);
    const float before = norm(v);
    for (int round = 0; round < 2; ++round) {  // twice is enough for full accuracy
      for (std::int64_t i = 0; i < size_; ++i) {
        part_[static_cast<std::size_t>(i)] = -dot_(rows_.data() + i * width_, v, width_);
      }
      add_(part_.data(), rows_.data(), size_, width_, v);
    }
    const float after = norm(v);
    if (!(after > kDependent * before)) return nullptr;
    for (std::int64_t n = 0; n < width_; ++n) v[n] /= after;
    ++size_;
    return v;
  }

 private:
  float norm(const float* v) const { return std::sqrt(dot_(v, v, width_)); }

  const cpu::RowDotFn dot_ =
      cpu::active().row_dot[static_cast<int>(DType::kFloat32)][static_cast<int>(DType::kFloat32)];
  const cpu::CombinationFn add_ = cpu::active().add_combination[static_cast<int>(DType::kFloat32)];
  std::int64_t width_, size_ = 0;
  std::vector<float> rows_;
  std::vector<float> part_;  // of a row along each of the others
};

// Signs in place of a row that is a sum of the others, as a repeated seed makes it.
void draw(std::uint64_t seed, float* row, std::int64_t width) {
  for (std::int64_t n = 0; n < width; ++n) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX
    row[n] = (seed >> 63) != 0 ? 1.0f : -1.0f;
  }
}

void start(const NewRows& f) {
  Basis basis(f.count, f.width);
  std::vector<bool> fresh(static_cast<std::size_t>(f.count), false);
  for (const std::int64_t row : f.fresh) fresh[static_cast<std::size_t>(row)] = true;
  for (std::int64_t row = 0; row < f.count; ++row) {
    if (!fresh[static_cast<std::size_t>(row)]) basis.add(f.rows + row * f.width);
  }
  for (const std::int64_t row : f.fresh) {
    float* out = f.rows + row * f.width;
    const float* unit = basis.add(out);
    for (std::uint64_t attempt = 0; unit == nullptr && attempt < 4 && f.count <= f.width; ++attempt) {
      draw(static_cast<std::uint64_t>(row) * 4 + attempt, out, f.width);
      unit = basis.add(out);
    }
    for (std::int64_t n = 0; unit != nullptr && n < f.width; ++n) out[n] = f.norm * unit[n];
  }
}

}  // namespace

void orthogonal_rows(const std::vector<NewRows>& factors, int threads) {
  double flops = 0.0;
  for (const NewRows& f : factors) {
    ARDLORA_CHECK(f.count >= 0 && f.width >= 0, "orthogonal_rows: sizes must be >= 0, got ", f.count, " x ", f.width);
    ARDLORA_CHECK(f.rows != nullptr || f.count * f.width == 0, "orthogonal_rows: rows must not be null");
    for (const std::int64_t row : f.fresh) {
      ARDLORA_CHECK(row >= 0 && row < f.count, "orthogonal_rows: fresh must be rows of ", f.count, ", got ", row);
    }
    flops += 4.0 * static_cast<double>(f.count * f.count * f.width);
  }
  const auto n = static_cast<std::int64_t>(factors.size());
  cpu::parallel_for(n, 1, cpu::useful_threads(threads, flops), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) start(factors[static_cast<std::size_t>(i)]);
  });
}

}  // namespace ardlora
