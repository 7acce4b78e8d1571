// The LoRA linear in double, straight from the equations of ardlora/lora_linear.h: what the kernels are compared with.
// Beside each sum goes the sum of its terms' sizes, which bounds what rounding can do to it.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "ardlora/lora_linear.h"
#include "testing/cases.h"

namespace ardlora::testing {

// A matrix in memory of its own, exactly as large as it must be: AddressSanitizer sees one element too many.
struct Matrix {
  DType dtype = DType::kFloat32;
  std::int64_t rows = 0, cols = 0, stride = 0;
  std::int64_t shift = 0;  // elements before the first one, so that it need not be aligned
  std::vector<unsigned char> bytes;

  Matrix() = default;
  Matrix(DType type, std::int64_t row_count, std::int64_t col_count, std::int64_t padding = 0, std::int64_t first = 0)
      : dtype(type), rows(row_count), cols(col_count), stride(col_count + padding), shift(first) {
    const std::int64_t elements = rows == 0 ? 0 : shift + (rows - 1) * stride + cols;
    bytes.assign(static_cast<std::size_t>(elements * dtype_size(dtype)), 0xff);  // NaN where nothing is written
  }

  unsigned char* address(std::int64_t i, std::int64_t j) {
    return bytes.data() + (shift + i * stride + j) * dtype_size(dtype);
  }
  double at(std::int64_t i, std::int64_t j) const {
    const unsigned char* p = const_cast<Matrix*>(this)->address(i, j);
    if (dtype == DType::kFloat32) return load<float>(p);
    return dtype == DType::kBFloat16 ? to_float(load<BFloat16>(p)) : to_float(load<Float16>(p));
  }
  void set(std::int64_t i, std::int64_t j, double value) {
    const auto f = static_cast<float>(value);
    if (dtype == DType::kFloat32) store(address(i, j), f);
    if (dtype == DType::kBFloat16) store(address(i, j), from_float<BFloat16>(f));
    if (dtype == DType::kFloat16) store(address(i, j), from_float<Float16>(f));
  }
  // Nearest value of the matrix's type.
  double rounded(double value) const {
    Matrix one(dtype, 1, 1);
    one.set(0, 0, value);
    return one.at(0, 0);
  }
  MatrixView view() { return {bytes.empty() ? nullptr : address(0, 0), rows, cols, stride, dtype}; }

  template <typename F>
  void fill(F&& value) {
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < cols; ++j) set(i, j, value());
    }
  }
  // Whether everything between the rows is as it was made.
  bool padding_untouched() const {
    Matrix copy = *this;
    const std::vector<unsigned char> nan(static_cast<std::size_t>(dtype_size(dtype)), 0xff);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < cols; ++j) std::memcpy(copy.address(i, j), nan.data(), nan.size());
    }
    return copy.bytes == std::vector<unsigned char>(bytes.size(), 0xff);
  }

 private:
  template <typename T>
  static T load(const unsigned char* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  template <typename T>
  static void store(unsigned char* p, T value) {
    std::memcpy(p, &value, sizeof value);
  }
};

// Sums and the sums of their terms' sizes.
struct Sums {
  std::int64_t cols = 0;
  std::vector<double> value, size;

  Sums() = default;
  Sums(std::int64_t row_count, std::int64_t col_count)
      : cols(col_count), value(static_cast<std::size_t>(row_count * col_count)), size(value.size()) {}
  std::size_t index(std::int64_t i, std::int64_t j) const { return static_cast<std::size_t>(i * cols + j); }
  void add(std::int64_t i, std::int64_t j, double term, double term_size) {
    value[index(i, j)] += term;
    size[index(i, j)] += term_size;
  }
};

// ardlora/philox.h, one element at a time.
inline double dropout_factor(const Dropout& d, std::int64_t row, std::int64_t column) {
  if (!d.active()) return 1.0;
  const auto counter = static_cast<std::uint64_t>(d.rows == nullptr ? row : d.rows[row]);
  std::uint64_t c[4] = {static_cast<std::uint64_t>(column / 128 * 16 + column % 16), counter, 0, 0};
  std::uint64_t k0 = d.seed & 0xffffffffu, k1 = d.seed >> 32;
  constexpr std::uint64_t kLow = 0xffffffffu;
  for (int round = 0; round < 7; ++round) {
    const std::uint64_t p0 = 0xD2511F53u * c[0], p1 = 0xCD9E8D57u * c[2];
    c[0] = (p1 >> 32) ^ c[1] ^ k0;
    c[2] = (p0 >> 32) ^ c[3] ^ k1;
    c[1] = p1 & kLow;
    c[3] = p0 & kLow;
    k0 = (k0 + 0x9E3779B9u) & kLow;
    k1 = (k1 + 0xBB67AE85u) & kLow;
  }
  const std::uint64_t half = c[column % 128 / 32] >> (column / 16 % 2 * 16) & 0xffffu;
  return half < d.threshold ? 0.0 : d.keep_scale;
}

// A factor with its gates and scale.
struct Side {
  const Factor& factor;
  const Matrix& weight;
  const float* gate;
  double scale;
  std::vector<std::int64_t> row_range = {};  // begin and end for each segment where rows are sorted; else all rows

  std::pair<std::int64_t, std::int64_t> rows(const Segment& s, std::int64_t all) const {
    if (row_range.empty()) return {0, all};
    const auto i = static_cast<std::size_t>(&s - factor.segments.data());
    return {row_range[2 * i], row_range[2 * i + 1]};
  }
  double scaled_gate(std::int64_t row) const { return gate == nullptr ? scale : scale * gate[row]; }
};

inline Sums reference_shrink(const Side& w, const Matrix& x, std::int64_t hidden, const Dropout& d) {
  Sums h(x.rows, hidden);
  for (const Segment& s : w.factor.segments) {
    const auto [begin, end] = w.rows(s, x.rows);
    for (std::int64_t m = begin; m < end; ++m) {
      for (std::int64_t c = 0; c < w.factor.width; ++c) {
        const double v = x.at(m, s.col_begin + c) * dropout_factor(d, m, s.col_begin + c);
        for (std::int64_t r = 0; v != 0.0 && r < s.rank; ++r) {
          const double term = w.scaled_gate(s.w_begin + r) * v * w.weight.at(s.w_begin + r, c);
          h.add(m, s.h_begin + r, term, std::abs(term));
        }
      }
    }
  }
  return h;
}

// What is added to y.
inline Sums reference_expand(const Side& w, const Sums& h, std::int64_t rows, const Dropout& d) {
  Sums y(rows, w.factor.features);
  for (const Segment& s : w.factor.segments) {
    const auto [begin, end] = w.rows(s, rows);
    for (std::int64_t r = 0; r < s.rank; ++r) {
      for (std::int64_t c = 0; c < w.factor.width; ++c) {
        const double v = w.scaled_gate(s.w_begin + r) * w.weight.at(s.w_begin + r, c);
        for (std::int64_t m = begin; v != 0.0 && m < end; ++m) {
          const std::size_t i = h.index(m, s.h_begin + r);
          const double factor = v * dropout_factor(d, m, s.col_begin + c);
          y.add(m, s.col_begin + c, factor * h.value[i], std::abs(factor) * h.size[i]);
        }
      }
    }
  }
  return y;
}

// Without the gates.
inline Sums reference_outer(const Side& w, const Sums& h, const Matrix& x, const Dropout& d) {
  Sums dw(w.weight.rows, w.factor.width);
  for (const Segment& s : w.factor.segments) {
    const auto [begin, end] = w.rows(s, x.rows);
    for (std::int64_t m = begin; m < end; ++m) {
      for (std::int64_t c = 0; c < w.factor.width; ++c) {
        const double v = w.scale * x.at(m, s.col_begin + c) * dropout_factor(d, m, s.col_begin + c);
        for (std::int64_t r = 0; v != 0.0 && r < s.rank; ++r) {
          const std::size_t i = h.index(m, s.h_begin + r);
          dw.add(s.w_begin + r, c, v * h.value[i], std::abs(v) * h.size[i]);
        }
      }
    }
  }
  return dw;
}

}  // namespace ardlora::testing
