// dW[w+j, n] = c_j * sum_m H[m, h+j] X[m, col+n]: vectors along n, a tile of ranks x columns in registers, M in blocks
// whose partial sums are added in order (short sums also round better than one long one).
inline constexpr std::int64_t kOuterRowBlock = 64;

template <std::int64_t Ranks, std::int64_t Vecs, typename XT>
inline void outer_tile(float* dw, std::int64_t w_stride, const float* h, std::int64_t h_stride, const XT* x,
                       std::int64_t x_stride, std::int64_t rows, std::int64_t n, std::int64_t left) {
  // `left` < kWidth only in the last, single vector of a row.
  const bool whole = left >= Vec::kWidth;
  Vec acc[Ranks][Vecs];
  for (std::int64_t q = 0; q < Ranks; ++q)
    for (std::int64_t v = 0; v < Vecs; ++v) acc[q][v] = Vec::zero();
  for (std::int64_t m = 0; m < rows; ++m) {
    const XT* xr = x + m * x_stride + n;
    Vec xv[Vecs];
    for (std::int64_t v = 0; v < Vecs; ++v) {
      xv[v] = Vecs > 1 || whole ? Vec::load(xr + v * Vec::kWidth) : Vec::load(xr, left);
    }
    for (std::int64_t q = 0; q < Ranks; ++q) {
      const Vec hv = Vec::broadcast(h[m * h_stride + q]);
      for (std::int64_t v = 0; v < Vecs; ++v) acc[q][v] = Vec::fma(hv, xv[v], acc[q][v]);
    }
  }
  for (std::int64_t q = 0; q < Ranks; ++q) {
    for (std::int64_t v = 0; v < Vecs; ++v) {
      float* out = dw + q * w_stride + n + v * Vec::kWidth;
      if (Vecs > 1 || whole) {
        Vec::add(Vec::load(out), acc[q][v]).store(out);
      } else {
        Vec::add(Vec::load(out, left), acc[q][v]).store(out, left);
      }
    }
  }
}

template <typename XT>
void outer(const KernelFactor& f, const Segment& s, const float* h, std::int64_t h_stride, const void* x,
           std::int64_t x_stride, std::int64_t rows, std::int64_t c_begin, std::int64_t c_end) {
  float* dw = static_cast<float*>(f.weight) + s.w_begin * f.w_stride;
  const std::int64_t whole = (c_end - c_begin) / Vec::kWidth;
  const std::int64_t tail = c_begin + whole * Vec::kWidth;
  for (std::int64_t j = 0; j < s.rank; ++j)
    for (std::int64_t n = c_begin; n < c_end; ++n) dw[j * f.w_stride + n] = 0.0f;

  for (std::int64_t m = 0; m < rows; m += kOuterRowBlock) {
    const std::int64_t count = rows - m < kOuterRowBlock ? rows - m : kOuterRowBlock;
    const XT* xb = static_cast<const XT*>(x) + m * x_stride + s.col_begin;
    for_tiles<Vec::kOuterRanks>(0, s.rank, [&]<std::int64_t Ranks>(std::int64_t j) {
      const float* hb = h + m * h_stride + s.h_begin + j;
      float* out = dw + j * f.w_stride;
      for_tiles<Vec::kOuterVecs>(0, whole, [&]<std::int64_t Vecs>(std::int64_t v) {
        outer_tile<Ranks, Vecs>(out, f.w_stride, hb, h_stride, xb, x_stride, count, c_begin + v * Vec::kWidth,
                                Vec::kWidth);
      });
      if (tail < c_end) {
        outer_tile<Ranks, 1>(out, f.w_stride, hb, h_stride, xb, x_stride, count, tail, c_end - tail);
      }
    });
  }

  for (std::int64_t j = 0; j < s.rank; ++j) {
    const float c = f.row_scale == nullptr ? f.scale : f.scale * f.row_scale[s.w_begin + j];
    for (std::int64_t n = c_begin; n < c_end; ++n) dw[j * f.w_stride + n] *= c;
  }
}
