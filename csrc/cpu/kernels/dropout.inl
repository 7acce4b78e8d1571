// Dropout (ardlora/philox.h) on a block of rows x columns: sixteen counters, 128 columns, at a time.
inline constexpr std::int64_t kPhiloxLanes = 16;
inline constexpr std::int64_t kPhiloxColumns = 8 * kPhiloxLanes;

// What columns [128 * block, 128 * (block + 1)) of a row are multiplied with.
inline void philox_factors(const Dropout& d, std::uint32_t row, std::uint32_t block, float* factors) {
  for (std::int64_t lane = 0; lane < kPhiloxLanes; lane += Vec::kWidth) {
    Words c0 = Words::iota(block * kPhiloxLanes + static_cast<std::uint32_t>(lane));
    Words c1 = Words::set(row), c2 = Words::set(0), c3 = Words::set(0);
    std::uint32_t k0 = static_cast<std::uint32_t>(d.seed), k1 = static_cast<std::uint32_t>(d.seed >> 32);
    for (int round = 0; round < 7; ++round) {
      Words hi0, lo0, hi1, lo1;
      Words::mul(0xD2511F53u, c0, &hi0, &lo0);
      Words::mul(0xCD9E8D57u, c2, &hi1, &lo1);
      c0 = Words::exclusive_or(Words::exclusive_or(hi1, c1), Words::set(k0));
      c2 = Words::exclusive_or(Words::exclusive_or(hi0, c3), Words::set(k1));
      c1 = lo1;
      c3 = lo0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const Words words[4] = {c0, c1, c2, c3};
    for (int w = 0; w < 4; ++w) {
      float* out = factors + 32 * w + lane;
      words[w].factors(d.threshold, d.keep_scale, out, out + kPhiloxLanes);
    }
  }
}

// Calls f(row, column, count, factors) for the columns of each block of 128 that lie in the range.
template <typename F>
inline void for_masked(const Dropout& d, std::int64_t m_begin, std::int64_t m_end, std::int64_t c_begin,
                       std::int64_t c_end, F&& f) {
  float factors[kPhiloxColumns];
  for (std::int64_t m = m_begin; m < m_end; ++m) {
    for (std::int64_t base = c_begin / kPhiloxColumns * kPhiloxColumns; base < c_end; base += kPhiloxColumns) {
      philox_factors(d, static_cast<std::uint32_t>(m), static_cast<std::uint32_t>(base / kPhiloxColumns), factors);
      const std::int64_t from = base < c_begin ? c_begin : base;
      const std::int64_t to = base + kPhiloxColumns < c_end ? base + kPhiloxColumns : c_end;
      f(m, from, to - from, factors + (from - base));
    }
  }
}

// out[i] = a[i] * factors[i] + (add ? out[i] : 0)
template <bool add, typename In, typename Out>
inline void multiply(const In* a, const float* factors, Out* out, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) {
    Vec::fma(Vec::load(a + i), Vec::load(factors + i), add ? Vec::load(out + i) : Vec::zero()).store(out + i);
  }
  if (i < count) {
    const std::int64_t n = count - i;
    const Vec old = add ? Vec::load(out + i, n) : Vec::zero();
    Vec::fma(Vec::load(a + i, n), Vec::load(factors + i, n), old).store(out + i, n);
  }
}

// dst[m - m_begin, n - c_begin] = mask * x[m, n]
template <typename T>
void dropout_copy(const Dropout& d, const void* x, std::int64_t x_stride, float* dst, std::int64_t dst_stride,
                  std::int64_t m_begin, std::int64_t m_end, std::int64_t c_begin, std::int64_t c_end) {
  for_masked(d, m_begin, m_end, c_begin, c_end,
             [&](std::int64_t m, std::int64_t n, std::int64_t count, const float* factors) {
               multiply<false>(static_cast<const T*>(x) + m * x_stride + n, factors,
                               dst + (m - m_begin) * dst_stride + (n - c_begin), count);
             });
}

// y[m, n] += mask * src[m - m_begin, n], over whole rows
template <typename T>
void dropout_add(const Dropout& d, const float* src, std::int64_t src_stride, void* y, std::int64_t y_stride,
                 std::int64_t m_begin, std::int64_t m_end, std::int64_t cols) {
  for_masked(d, m_begin, m_end, 0, cols, [&](std::int64_t m, std::int64_t n, std::int64_t count, const float* factors) {
    multiply<true>(src + (m - m_begin) * src_stride + n, factors, static_cast<T*>(y) + m * y_stride + n, count);
  });
}
