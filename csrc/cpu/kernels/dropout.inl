// Dropout (ardlora/philox.h) on a block of rows x columns: sixteen counters, 128 columns, at a time, in plain loops
// that the compiler turns into vectors.
inline constexpr std::int64_t kPhiloxLanes = 16;
inline constexpr std::int64_t kPhiloxColumns = 8 * kPhiloxLanes;

// bits[i] of columns [group * 8, group * 8 + 128) of a row.
inline void philox_row(std::uint64_t seed, std::uint32_t row, std::uint32_t group, std::uint16_t* bits) {
  std::uint32_t c0[kPhiloxLanes], c1[kPhiloxLanes], c2[kPhiloxLanes], c3[kPhiloxLanes];
  for (std::int64_t i = 0; i < kPhiloxLanes; ++i) {
    c0[i] = group + static_cast<std::uint32_t>(i);
    c1[i] = row;
    c2[i] = 0;
    c3[i] = 0;
  }
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    for (std::int64_t i = 0; i < kPhiloxLanes; ++i) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0[i];
      const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c2[i];
      c0[i] = static_cast<std::uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<std::uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<std::uint32_t>(p1);
      c3[i] = static_cast<std::uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (std::int64_t i = 0; i < kPhiloxLanes; ++i) {
    const std::uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
    for (int w = 0; w < 4; ++w) {
      bits[8 * i + 2 * w] = static_cast<std::uint16_t>(words[w]);
      bits[8 * i + 2 * w + 1] = static_cast<std::uint16_t>(words[w] >> 16);
    }
  }
}

// Calls f(row, column, count, factors) where factors[i] is keep_scale or 0.
template <typename F>
inline void for_masked(const Dropout& d, std::int64_t m_begin, std::int64_t m_end, std::int64_t c_begin,
                       std::int64_t c_end, F&& f) {
  std::uint16_t bits[kPhiloxColumns];
  float factors[kPhiloxColumns];
  for (std::int64_t m = m_begin; m < m_end; ++m) {
    for (std::int64_t base = c_begin / 8 * 8; base < c_end; base += kPhiloxColumns) {
      philox_row(d.seed, static_cast<std::uint32_t>(m), static_cast<std::uint32_t>(base / 8), bits);
      for (std::int64_t i = 0; i < kPhiloxColumns; ++i) factors[i] = bits[i] < d.threshold ? 0.0f : d.keep_scale;
      const std::int64_t from = base < c_begin ? c_begin : base;
      const std::int64_t to = base + kPhiloxColumns < c_end ? base + kPhiloxColumns : c_end;
      f(m, from, to - from, factors + (from - base));
    }
  }
}

// dst[m - m_begin, n - c_begin] = mask * x[m, n]
template <typename T>
void dropout_copy(const Dropout& d, const void* x, std::int64_t x_stride, float* dst, std::int64_t dst_stride,
                  std::int64_t m_begin, std::int64_t m_end, std::int64_t c_begin, std::int64_t c_end) {
  for_masked(d, m_begin, m_end, c_begin, c_end,
             [&](std::int64_t m, std::int64_t n, std::int64_t count, const float* factors) {
               const T* from = static_cast<const T*>(x) + m * x_stride + n;
               float* to = dst + (m - m_begin) * dst_stride + (n - c_begin);
               for (std::int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]) * factors[i];
             });
}

// y[m, n] += mask * src[m - m_begin, n], over whole rows
template <typename T>
void dropout_add(const Dropout& d, const float* src, std::int64_t src_stride, void* y, std::int64_t y_stride,
                 std::int64_t m_begin, std::int64_t m_end, std::int64_t cols) {
  for_masked(d, m_begin, m_end, 0, cols, [&](std::int64_t m, std::int64_t n, std::int64_t count, const float* factors) {
    const float* from = src + (m - m_begin) * src_stride + n;
    T* to = static_cast<T*>(y) + m * y_stride + n;
    for (std::int64_t i = 0; i < count; ++i) {
      const float sum = to_float(to[i]) + from[i] * factors[i];
      if constexpr (sizeof(T) == 4) {
        to[i] = sum;
      } else {
        to[i] = to_bfloat16(sum);
      }
    }
  });
}
