// Dropout (ardlora/philox.h) as a bitmap of the columns that are kept, sixteen counters, 128 columns, at a time.
inline constexpr std::int64_t kPhiloxLanes = 16;

inline void philox_bits(const Dropout& d, std::uint32_t row, std::uint32_t block, std::uint32_t* bits) {
  bits[0] = bits[1] = bits[2] = bits[3] = 0;
  for (std::int64_t lane = 0; lane < kPhiloxLanes; lane += Vec::kWidth) {
    Words c0 = Words::iota(block * kPhiloxLanes + static_cast<std::uint32_t>(lane));
    Words c1 = Words::set(row), c2 = Words::set(0), c3 = Words::set(0);
    std::uint32_t k0 = static_cast<std::uint32_t>(d.seed), k1 = static_cast<std::uint32_t>(d.seed >> 32);
    for (int round = 0; round < 7; ++round) {
      Words hi0, lo0, hi1, lo1;
      Words::mul(0xD2511F53u, c0, &hi0, &lo0);
      Words::mul(0xCD9E8D57u, c2, &hi1, &lo1);
      c0 = Words::exclusive_or(hi1, c1, Words::set(k0));
      c2 = Words::exclusive_or(hi0, c3, Words::set(k1));
      c1 = lo1;
      c3 = lo0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const Words words[4] = {c0, c1, c2, c3};
    for (int w = 0; w < 4; ++w) bits[w] |= words[w].not_below(d.threshold) << lane;
  }
}

// Row m's bitmap is keep[m - m_begin], whole blocks of 128 columns.
inline void keep_bits(const Dropout& d, std::int64_t m_begin, std::int64_t m_end, std::int64_t cols,
                      std::uint32_t* keep, std::int64_t keep_stride) {
  for (std::int64_t m = m_begin; m < m_end; ++m, keep += keep_stride) {
    const auto counter = static_cast<std::uint32_t>(d.rows == nullptr ? m : d.rows[m]);
    for (std::int64_t block = 0; block * 128 < cols; ++block) {
      philox_bits(d, counter, static_cast<std::uint32_t>(block), keep + 4 * block);
    }
  }
}

// Rows of x as operands of shrink: what is dropped becomes 0.
template <typename XT>
void pack_rows(const void* x, std::int64_t x_stride, const std::uint32_t* keep, std::int64_t keep_stride,
               std::int64_t rows, std::int64_t cols, void* packed, std::int64_t packed_stride) {
  using Elem = typename Operands<XT>::Elem;
  for (std::int64_t m = 0; m < rows; ++m) {
    const XT* in = static_cast<const XT*>(x) + m * x_stride;
    Elem* out = static_cast<Elem*>(packed) + m * packed_stride;
    for (std::int64_t n = 0; n < cols; n += Vec::kWidth) {
      const std::int64_t left = cols - n < Vec::kWidth ? cols - n : Vec::kWidth;
      Vec v = left == Vec::kWidth ? Vec::load(in + n) : Vec::load(in + n, left);
      if (keep != nullptr) v = v.keep(static_cast<std::uint32_t>(keep_at(keep + m * keep_stride, n)));
      if (left == Vec::kWidth) {
        v.store(out + n);
      } else {
        v.store(out + n, left);
      }
    }
  }
}
