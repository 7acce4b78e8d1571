// dW[w+j, n] = c_j * sum_m H[m, h+j] X[m, col+n]: lanes are columns, H is broadcast, a tile of ranks x columns in
// registers, M in blocks whose partial sums are added in order (short sums also round better than one long one).
inline constexpr std::int64_t kOuterRowBlock = 64;

// Rows 2m and 2m + 1 of H side by side, as operands; a row that is missing at the end is zero.
#ifdef ARDLORA_ISA_HAS_PAIRS
inline void pair_hidden(const float* h, std::int64_t h_stride, std::int64_t rows, std::int64_t cols,
                        std::uint32_t* pairs, std::int64_t pairs_stride) {
  for (std::int64_t m = 0; m < rows; m += 2) {
    for (std::int64_t j = 0; j < cols; j += Vec::kWidth) {
      const std::int64_t n = cols - j < Vec::kWidth ? cols - j : Vec::kWidth;
      const Vec second = m + 1 < rows ? Vec::load(h + (m + 1) * h_stride + j, n) : Vec::zero();
      Pairs::zip(Vec::load(h + m * h_stride + j, n), second).store(pairs + m / 2 * pairs_stride + j);
    }
  }
}
#else
inline constexpr PairHiddenFn pair_hidden = nullptr;
#endif

// One block of rows; `first`: nothing has been summed before, `last`: c_j completes the sum.
template <typename Ops, bool Masked, std::int64_t Ranks, std::int64_t Vecs, typename XT>
ARDLORA_INLINE void outer_tile(const OuterArgs& a, std::int64_t j, std::int64_t m_begin, std::int64_t m_end,
                               std::int64_t n, std::int64_t left) {
  using Elem = std::conditional_t<Ops::kDepth == 1, float, std::uint32_t>;
  Vec acc[Ranks][Vecs];
  clear(acc);
  const Elem* h = static_cast<const Elem*>(a.h) + m_begin / Ops::kDepth * a.h_stride + j;
  for (std::int64_t m = m_begin; m < m_end; m += Ops::kDepth, h += a.h_stride) {
    const std::int64_t next = m + Ops::kDepth - 1 < m_end ? m + Ops::kDepth - 1 : m;  // meets a zero of H at the end
    const XT* x = static_cast<const XT*>(a.x) + n;
    const std::uint32_t* keep = Masked ? a.keep + m * a.keep_stride : nullptr;
    const std::uint32_t* keep_next = Masked ? a.keep + next * a.keep_stride : nullptr;
    if constexpr (Vecs >
                  1) {  // the next tile's columns: only rows follow each other here, which hides them from the CPU
      prefetch<Vecs>(x + m * a.x_stride + Vecs * Vec::kWidth);
      if constexpr (Ops::kDepth > 1) prefetch<Vecs>(x + next * a.x_stride + Vecs * Vec::kWidth);
    }
    typename Ops::Operand xs[Vecs];
    Ops::template across<Vecs, Masked>(x + m * a.x_stride, x + next * a.x_stride, keep, keep_next, a.keep_col + n, left,
                                       xs);
    unroll<Ranks>([&]<std::int64_t Q>() ARDLORA_INLINE_LAMBDA {
      const auto hs = Ops::template repeat<1>(reinterpret_cast<const typename Ops::Elem*>(h + Q));
      unroll<Vecs>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA { acc[Q][V] = Ops::madd(hs, xs[V], acc[Q][V]); });
    });
  }
  const bool last = m_end == a.rows;
  unroll<Ranks>([&]<std::int64_t Q>() ARDLORA_INLINE_LAMBDA {
    const Vec c = Vec::broadcast(a.row_scale == nullptr ? a.scale : a.scale * a.row_scale[j + Q]);
    unroll<Vecs>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA {
      float* out = a.dw + (j + Q) * a.dw_stride + n + V * Vec::kWidth;
      const bool whole = Vecs > 1 || left >= Vec::kWidth;
      if (m_begin > 0) acc[Q][V] = Vec::add(whole ? Vec::load(out) : Vec::load(out, left), acc[Q][V]);
      if (last) acc[Q][V] = Vec::mul(c, acc[Q][V]);
      if (whole) {
        acc[Q][V].store(out);
      } else {
        acc[Q][V].store(out, left);
      }
    });
  });
}

template <bool Masked, typename XT>
inline void outer_columns(const OuterArgs& a) {
  using Ops = Operands<XT>;
  const std::int64_t whole = a.c_begin + (a.c_end - a.c_begin) / Vec::kWidth * Vec::kWidth;
  for (std::int64_t m = 0; m < a.rows; m += kOuterRowBlock) {
    const std::int64_t end = m + kOuterRowBlock < a.rows ? m + kOuterRowBlock : a.rows;
    for_tiles<Vec::kOuterRanks>(0, a.rank, [&]<std::int64_t Ranks>(std::int64_t j) {
      constexpr std::int64_t kVecs = Vec::kOuterTile / Ranks < 4 ? Vec::kOuterTile / Ranks : 4;
      for_tiles<kVecs>(a.c_begin / Vec::kWidth, whole / Vec::kWidth, [&]<std::int64_t Vecs>(std::int64_t v) {
        outer_tile<Ops, Masked, Ranks, Vecs, XT>(a, j, m, end, v * Vec::kWidth, Vec::kWidth);
      });
      if (whole < a.c_end) outer_tile<Ops, Masked, Ranks, 1, XT>(a, j, m, end, whole, a.c_end - whole);
    });
  }
}

template <typename XT>
void outer(const OuterArgs& a) {
  if (a.rows == 0) {
    for (std::int64_t j = 0; j < a.rank; ++j)
      for (std::int64_t n = a.c_begin; n < a.c_end; ++n) a.dw[j * a.dw_stride + n] = 0.0f;
  } else if (a.keep != nullptr) {
    outer_columns<true, XT>(a);
  } else {
    outer_columns<false, XT>(a);
  }
}
