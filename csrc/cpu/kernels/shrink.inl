// H[m, h+j] += c_j * sum_k X[m, col+k] W[w+j, k]: dot products along k, a tile of rows x ranks in registers.
template <std::int64_t Rows, std::int64_t Ranks, typename XT, typename WT>
inline void shrink_tile(const KernelFactor& f, const Segment& s, const XT* x, std::int64_t x_stride, float* h,
                        std::int64_t h_stride, std::int64_t m, std::int64_t j) {
  const XT* xt = x + m * x_stride + s.col_begin;
  const WT* wt = static_cast<const WT*>(f.weight) + (s.w_begin + j) * f.w_stride;
  Vec acc[Rows][Ranks];
  for (std::int64_t r = 0; r < Rows; ++r)
    for (std::int64_t q = 0; q < Ranks; ++q) acc[r][q] = Vec::zero();

  const auto step = [&](auto load_x, auto load_w) {
    Vec wv[Ranks];
    for (std::int64_t q = 0; q < Ranks; ++q) wv[q] = load_w(wt + q * f.w_stride);
    for (std::int64_t r = 0; r < Rows; ++r) {
      const Vec xv = load_x(xt + r * x_stride);
      for (std::int64_t q = 0; q < Ranks; ++q) acc[r][q] = Vec::fma(xv, wv[q], acc[r][q]);
    }
  };
  std::int64_t k = 0;
  for (; k + Vec::kWidth <= f.width; k += Vec::kWidth) {
    step([k](const XT* p) { return Vec::load(p + k); }, [k](const WT* p) { return Vec::load(p + k); });
  }
  if (k < f.width) {
    const std::int64_t n = f.width - k;
    step([k, n](const XT* p) { return Vec::load(p + k, n); }, [k, n](const WT* p) { return Vec::load(p + k, n); });
  }

  for (std::int64_t q = 0; q < Ranks; ++q) {
    const float c = f.row_scale == nullptr ? f.scale : f.scale * f.row_scale[s.w_begin + j + q];
    for (std::int64_t r = 0; r < Rows; ++r) h[(m + r) * h_stride + s.h_begin + j + q] += c * acc[r][q].sum();
  }
}

template <typename XT, typename WT>
void shrink(const KernelFactor& f, const void* x, std::int64_t x_stride, float* h, std::int64_t h_stride,
            std::int64_t m_begin, std::int64_t m_end) {
  const XT* xs = static_cast<const XT*>(x);
  for (const Segment* s = f.segments; s != f.segments + f.n_segments; ++s) {
    for_tiles<Vec::kShrinkRows>(m_begin, m_end, [&]<std::int64_t Rows>(std::int64_t m) {
      for_tiles<Vec::kShrinkRanks>(0, s->rank, [&]<std::int64_t Ranks>(std::int64_t j) {
        shrink_tile<Rows, Ranks, XT, WT>(f, *s, xs, x_stride, h, h_stride, m, j);
      });
    });
  }
}
