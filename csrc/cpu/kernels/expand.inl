// Y[m, col+n] += sum_j (c_j H[m, h+j]) W[w+j, n]: vectors along n, the whole rank in registers, Y rounded once.
template <std::int64_t Rows, std::int64_t Vecs, typename YT, typename WT>
inline void expand_tile(const float* hs, std::int64_t rank, const WT* w, std::int64_t w_stride, YT* y,
                        std::int64_t y_stride, std::int64_t n) {
  Vec acc[Rows][Vecs];
  for (std::int64_t r = 0; r < Rows; ++r)
    for (std::int64_t v = 0; v < Vecs; ++v) acc[r][v] = Vec::load(y + r * y_stride + n + v * Vec::kWidth);
  for (std::int64_t j = 0; j < rank; ++j) {
    Vec wv[Vecs];
    for (std::int64_t v = 0; v < Vecs; ++v) wv[v] = Vec::load(w + j * w_stride + n + v * Vec::kWidth);
    for (std::int64_t r = 0; r < Rows; ++r) {
      const Vec hv = Vec::broadcast(hs[j * Rows + r]);
      for (std::int64_t v = 0; v < Vecs; ++v) acc[r][v] = Vec::fma(hv, wv[v], acc[r][v]);
    }
  }
  for (std::int64_t r = 0; r < Rows; ++r)
    for (std::int64_t v = 0; v < Vecs; ++v) acc[r][v].store(y + r * y_stride + n + v * Vec::kWidth);
}

template <std::int64_t Rows, typename YT, typename WT>
inline void expand_tail(const float* hs, std::int64_t rank, const WT* w, std::int64_t w_stride, YT* y,
                        std::int64_t y_stride, std::int64_t n, std::int64_t left) {
  Vec acc[Rows];
  for (std::int64_t r = 0; r < Rows; ++r) acc[r] = Vec::load(y + r * y_stride + n, left);
  for (std::int64_t j = 0; j < rank; ++j) {
    const Vec wv = Vec::load(w + j * w_stride + n, left);
    for (std::int64_t r = 0; r < Rows; ++r) acc[r] = Vec::fma(Vec::broadcast(hs[j * Rows + r]), wv, acc[r]);
  }
  for (std::int64_t r = 0; r < Rows; ++r) acc[r].store(y + r * y_stride + n, left);
}

template <typename YT, typename WT>
void expand(const KernelFactor& f, const float* h, std::int64_t h_stride, void* y, std::int64_t y_stride,
            std::int64_t m_begin, std::int64_t m_end, float* scratch) {
  static_assert(Vec::kExpandRows <= kMaxRowTile);
  for (const Segment* s = f.segments; s != f.segments + f.n_segments; ++s) {
    const WT* w = static_cast<const WT*>(f.weight) + s->w_begin * f.w_stride;
    for_tiles<Vec::kExpandRows>(m_begin, m_end, [&]<std::int64_t Rows>(std::int64_t m) {
      for (std::int64_t j = 0; j < s->rank; ++j) {
        const float c = f.row_scale == nullptr ? f.scale : f.scale * f.row_scale[s->w_begin + j];
        for (std::int64_t r = 0; r < Rows; ++r) scratch[j * Rows + r] = c * h[(m + r) * h_stride + s->h_begin + j];
      }
      YT* yt = static_cast<YT*>(y) + m * y_stride + s->col_begin;
      const std::int64_t whole = f.width / Vec::kWidth;
      for_tiles<Vec::kExpandVecs>(0, whole, [&]<std::int64_t Vecs>(std::int64_t v) {
        expand_tile<Rows, Vecs>(scratch, s->rank, w, f.w_stride, yt, y_stride, v * Vec::kWidth);
      });
      const std::int64_t n = whole * Vec::kWidth;
      if (n < f.width) expand_tail<Rows>(scratch, s->rank, w, f.w_stride, yt, y_stride, n, f.width - n);
    });
  }
}
