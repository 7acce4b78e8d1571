// Y[m, col+n] += sum_j H[m, j] W[w+j, n]: lanes are columns, H (gates and scale in it) is broadcast, a tile of rows x
// columns in registers over the whole rank; Y is rounded once. A panel holds up to kExpandVecs vectors of columns,
// step after step of kDepth ranks.
template <typename F>
inline void for_panels(std::int64_t begin, std::int64_t end, F&& f) {
  // The last vector of the last panel may be cut.
  for_tiles<Vec::kExpandVecs>(begin / Vec::kWidth, (end + Vec::kWidth - 1) / Vec::kWidth,
                              [&]<std::int64_t Vecs>(std::int64_t v) { f.template operator()<Vecs>(v * Vec::kWidth); });
}

template <typename Ops, typename WT>
void pack_expand(const ColumnSegment& s, const void* w, std::int64_t w_stride, std::int64_t width, std::int64_t c_begin,
                 std::int64_t c_end, void* panels) {
  const std::int64_t steps = (s.rank + Ops::kDepth - 1) / Ops::kDepth;
  const WT* rows = static_cast<const WT*>(w) + s.w_row * w_stride;
  for_panels(c_begin, c_end, [&]<std::int64_t Vecs>(std::int64_t n) {
    auto* panel = static_cast<typename Ops::Lane*>(panels) + s.panel + n * steps;
    for (std::int64_t j = 0; j < steps; ++j) {
      const WT* first = rows + j * Ops::kDepth * w_stride + n;
      // A missing second rank meets a zero of H.
      const WT* second = (j + 1) * Ops::kDepth <= s.rank ? first + w_stride : first;
      for (std::int64_t v = 0; v < Vecs; ++v, panel += Vec::kWidth) {
        const std::int64_t c = v * Vec::kWidth;
        Ops::store(Ops::across(first + c, second + c, width - n - c), panel);
      }
    }
  });
}

// Rows of H as operands: c_j H[m, h+j], each segment filled up with zeros to whole steps.
template <typename Ops>
void pack_hidden(const HiddenArgs& a) {
  using Elem = typename Ops::Elem;
  for (std::int64_t m = 0; m < a.rows; ++m) {
    const float* h = a.h + m * a.h_stride;
    Elem* out = static_cast<Elem*>(a.hidden) + m * a.hidden_stride;
    for (const ColumnSegment* s = a.segments; s != a.segments + a.n_segments; ++s) {
      const std::int64_t room = (s->rank + Ops::kDepth - 1) / Ops::kDepth * Ops::kDepth;
      for (std::int64_t j = 0; j < s->rank; j += Vec::kWidth) {
        const std::int64_t n = s->rank - j < Vec::kWidth ? s->rank - j : Vec::kWidth;
        const std::int64_t filled = room - j < Vec::kWidth ? room - j : Vec::kWidth;
        Vec c = Vec::broadcast(a.scale);
        if (a.row_scale != nullptr) c = Vec::mul(c, Vec::load(a.row_scale + s->w_row + j, n));
        Vec::mul(c, Vec::load(h + s->h_col + j, n)).store(out + s->hidden + j, filled);
      }
    }
  }
}

template <typename Ops, bool Masked, std::int64_t Rows, std::int64_t Vecs, typename YT>
ARDLORA_INLINE void expand_tile(const ExpandArgs& a, const typename Ops::Lane* panel, std::int64_t steps,
                                const typename Ops::Elem* hidden, YT* y, std::int64_t m, std::int64_t col,
                                std::int64_t left) {
  Vec acc[Rows][Vecs];
  clear(acc);
  unroll<Rows>([&]<std::int64_t R>()
                   ARDLORA_INLINE_LAMBDA { prefetch<Vecs>(y + R * a.y_stride + Vecs * Vec::kWidth); });
  for (std::int64_t j = 0; j < steps; ++j) {
    typename Ops::Operand w[Vecs];
    unroll<Vecs>([&]<std::int64_t V>()
                     ARDLORA_INLINE_LAMBDA { w[V] = Ops::load(panel + (j * Vecs + V) * Vec::kWidth); });
    unroll<Rows>([&]<std::int64_t R>() ARDLORA_INLINE_LAMBDA {
      const auto h = Ops::template repeat<1>(hidden + R * a.hidden_stride + j * Ops::kDepth);
      unroll<Vecs>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA { acc[R][V] = Ops::madd(h, w[V], acc[R][V]); });
    });
  }
  if constexpr (Masked) {
    unroll<Rows * Vecs>([&]<std::int64_t I>() ARDLORA_INLINE_LAMBDA {
      constexpr std::int64_t R = I / Vecs, V = I % Vecs;
      const std::uint32_t* keep = a.keep + (m + R) * a.keep_stride;
      acc[R][V] = acc[R][V].keep(static_cast<std::uint32_t>(keep_at(keep, col + V * Vec::kWidth)));
    });
  }
  if (left >= Vecs * Vec::kWidth) {
    // All loads before all stores: rows a multiple of 4 KB apart look alike to the store queue, and would wait for it.
    unroll<Rows * Vecs>([&]<std::int64_t I>() ARDLORA_INLINE_LAMBDA {
      constexpr std::int64_t R = I / Vecs, V = I % Vecs;
      acc[R][V] = Vec::add(Vec::load(y + R * a.y_stride + V * Vec::kWidth), acc[R][V]);
    });
    unroll<Rows * Vecs>([&]<std::int64_t I>() ARDLORA_INLINE_LAMBDA {
      constexpr std::int64_t R = I / Vecs, V = I % Vecs;
      acc[R][V].store(y + R * a.y_stride + V * Vec::kWidth);
    });
  } else {
    unroll<Rows * Vecs>([&]<std::int64_t I>() ARDLORA_INLINE_LAMBDA {
      constexpr std::int64_t R = I / Vecs, V = I % Vecs;
      const std::int64_t n = left - V * Vec::kWidth < Vec::kWidth ? left - V * Vec::kWidth : Vec::kWidth;
      YT* p = y + R * a.y_stride + V * Vec::kWidth;
      Vec::add(Vec::load(p, n), acc[R][V]).store(p, n);
    });
  }
}

template <typename Ops, bool Masked, typename YT>
inline void expand_segment(const ExpandArgs& a, const ColumnSegment& s, std::int64_t m_begin, std::int64_t m_end) {
  const std::int64_t steps = (s.rank + Ops::kDepth - 1) / Ops::kDepth;
  for_panels(0, a.width, [&]<std::int64_t Vecs>(std::int64_t n) {
    const auto* panel = static_cast<const typename Ops::Lane*>(a.panels) + s.panel + n * steps;
    for_tiles<Vec::kExpandRows>(m_begin, m_end, [&]<std::int64_t Rows>(std::int64_t m) {
      const auto* hidden = static_cast<const typename Ops::Elem*>(a.hidden) + m * a.hidden_stride + s.hidden;
      YT* y = static_cast<YT*>(a.y) + m * a.y_stride + s.y_col + n;
      expand_tile<Ops, Masked, Rows, Vecs>(a, panel, steps, hidden, y, m, s.y_col + n, a.width - n);
    });
  });
}

// A panel that stays in L1 serves all rows; small panels let a few rows of Y be walked in order instead.
template <typename YT>
void expand(const ExpandArgs& a) {
  using Ops = Operands<YT>;
  constexpr std::int64_t kSmallPanels = 24 * 1024;
  for (const ColumnSegment* s = a.segments; s != a.segments + a.n_segments; ++s) {
    const bool small = s->rank * a.width * 4 <= kSmallPanels * Ops::kDepth;
    const std::int64_t block = small ? Vec::kExpandRows : a.rows;
    for (std::int64_t m = 0; m < a.rows; m += block) {
      const std::int64_t end = m + block < a.rows ? m + block : a.rows;
      if (a.keep != nullptr) {
        expand_segment<Ops, true, YT>(a, *s, m, end);
      } else {
        expand_segment<Ops, false, YT>(a, *s, m, end);
      }
    }
  }
}
