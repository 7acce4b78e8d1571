// Y[m, col+n] += sum_j H[m, j] W[w+j, n]: lanes are columns, H (gates and scale in it) is broadcast, a tile of rows x
// columns in registers over the whole rank; Y is rounded once. A panel holds up to kExpandVecs vectors of columns,
// step after step of kDepth ranks.
template <typename Ops, typename F>
ARDLORA_INLINE void for_panels(std::int64_t begin, std::int64_t end, F&& f) {
  constexpr std::int64_t kPiece = Ops::kDepth * Vec::kWidth;  // the last one of the last panel may be cut
  for_tiles<Vec::kExpandVecs / Ops::kDepth>(begin / kPiece, (end + kPiece - 1) / kPiece,
                                            [&]<std::int64_t Pieces>(std::int64_t i) ARDLORA_INLINE_LAMBDA {
                                              f.template operator()<Pieces * Ops::kDepth>(i * kPiece);
                                            });
}

template <typename Ops, typename WT>
void pack_expand(const ColumnSegment& s, const void* w, std::int64_t w_stride, std::int64_t width, std::int64_t c_begin,
                 std::int64_t c_end, void* panels) {
  const std::int64_t steps = (s.rank + Ops::kDepth - 1) / Ops::kDepth;
  const WT* rows = static_cast<const WT*>(w) + s.w_row * w_stride;
  for_panels<Ops>(c_begin, c_end, [&]<std::int64_t Vecs>(std::int64_t n) {
    auto* panel = static_cast<typename Ops::Lane*>(panels) + s.panel + n * steps;
    for (std::int64_t j = 0; j < steps; ++j) {
      const WT* first = rows + j * Ops::kDepth * w_stride + n;
      // A missing second rank meets a zero of H.
      const WT* second = (j + 1) * Ops::kDepth <= s.rank ? first + w_stride : first;
      for (std::int64_t c = 0; c < Vecs * Vec::kWidth; c += Ops::kDepth * Vec::kWidth) {
        Ops::panel(first + c, second + c, width - n - c, panel + c);
      }
      panel += Vecs * Vec::kWidth;
    }
  });
}

// Rows of H as operands: c_j H[m, h+j], each segment filled up with zeros to whole steps.
template <typename Ops>
void pack_hidden(const HiddenArgs& a) {
  using Elem = typename Ops::Elem;
  for (const ColumnSegment* s = a.segments; s != a.segments + a.n_segments; ++s) {
    const std::int64_t room = (s->rank + Ops::kDepth - 1) / Ops::kDepth * Ops::kDepth;
    for (std::int64_t j = 0; j < s->rank; j += Vec::kWidth) {
      const std::int64_t n = s->rank - j < Vec::kWidth ? s->rank - j : Vec::kWidth;
      const std::int64_t filled = room - j < Vec::kWidth ? room - j : Vec::kWidth;
      Vec c = Vec::broadcast(a.scale);
      if (a.row_scale != nullptr) c = Vec::mul(c, Vec::load(a.row_scale + s->w_row + j, n));
      const float* h = a.h + s->h_col + j;
      Elem* out = static_cast<Elem*>(a.hidden) + s->hidden + j;
      for (std::int64_t m = 0, rows = a.rows, h_stride = a.h_stride, stride = a.hidden_stride; m < rows; ++m) {
        Vec::mul(c, Vec::load(h + m * h_stride, n)).store(out + m * stride, filled);
      }
    }
  }
}

// A tile of Y, the first of whose rows and columns all pointers are at.
template <typename Ops, typename YT>
struct ExpandTile {
  const typename Ops::Lane* panel;
  std::int64_t steps;
  const typename Ops::Elem* hidden;
  std::int64_t hidden_stride;
  YT* y;
  std::int64_t y_stride;
  const std::uint32_t* keep;
  std::int64_t keep_stride;
  std::int64_t col, left;  // bit of the first column; columns that are there
};

template <bool Masked, bool Whole, std::int64_t Rows, std::int64_t Vecs, typename Ops, typename YT>
ARDLORA_INLINE void expand_tile(const ExpandTile<Ops, YT> t) {
  Vec acc[Rows][Vecs];
  unroll<Rows>([&]<std::int64_t R>() ARDLORA_INLINE_LAMBDA {
    prefetch<Vecs, 2>(t.y + (R + Rows) * t.y_stride);  // the next rows
    Ops::template begin<Whole>(t.y + R * t.y_stride, t.left, acc[R]);
  });
  for (std::int64_t j = 0; j < t.steps; ++j) {
    typename Ops::Operand w[Vecs];
    unroll<Vecs>([&]<std::int64_t V>()
                     ARDLORA_INLINE_LAMBDA { w[V] = Ops::load(t.panel + (j * Vecs + V) * Vec::kWidth); });
    unroll<Rows>([&]<std::int64_t R>() ARDLORA_INLINE_LAMBDA {
      const auto h = Ops::template repeat<1>(t.hidden + R * t.hidden_stride + j * Ops::kDepth);
      unroll<Vecs>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA { acc[R][V] = Ops::madd(h, w[V], acc[R][V]); });
    });
  }
  const auto keep = [&](std::int64_t r) { return Masked ? t.keep + r * t.keep_stride : nullptr; };
  // All loads before all stores: rows a multiple of 4 KB apart look alike to the store queue, and would wait for it.
  unroll<Rows>([&]<std::int64_t R>() ARDLORA_INLINE_LAMBDA {
    Ops::template add<Whole, Masked>(t.y + R * t.y_stride, keep(R), t.col, t.left, acc[R]);
  });
  unroll<Rows>([&]<std::int64_t R>() ARDLORA_INLINE_LAMBDA {
    Ops::template end<Whole, Masked>(acc[R], keep(R), t.col, t.left, t.y + R * t.y_stride);
  });
}

// A few rows of Y at a time, in order: panels come from the L2 cache.
template <typename Ops, bool Masked, typename YT>
inline void expand_segment(const ExpandArgs& a, const ColumnSegment& s) {
  const std::int64_t width = a.width;
  const ExpandTile<Ops, YT> first{static_cast<const typename Ops::Lane*>(a.panels) + s.panel,
                                  (s.rank + Ops::kDepth - 1) / Ops::kDepth,
                                  static_cast<const typename Ops::Elem*>(a.hidden) + s.hidden,
                                  a.hidden_stride,
                                  static_cast<YT*>(a.y) + s.y_col,
                                  a.y_stride,
                                  a.keep,
                                  a.keep_stride,
                                  s.y_col,
                                  width};
  const auto tile = [=]<std::int64_t Rows, std::int64_t Vecs>(std::int64_t m, std::int64_t n) ARDLORA_INLINE_LAMBDA {
    ExpandTile<Ops, YT> t = first;
    t.panel += n * t.steps;
    t.hidden += m * t.hidden_stride;
    t.y += m * t.y_stride + n;
    if constexpr (Masked) t.keep += m * t.keep_stride;
    t.col += n;
    t.left -= n;
    if (t.left >= Vecs * Vec::kWidth) {
      expand_tile<Masked, true, Rows, Vecs>(t);
    } else {
      expand_tile<Masked, false, Rows, Vecs>(t);
    }
  };
  for_tiles<Vec::kExpandRows>(0, a.rows, [&]<std::int64_t Rows>(std::int64_t m) ARDLORA_INLINE_LAMBDA {
    for_panels<Ops>(0, width, [&]<std::int64_t Vecs>(std::int64_t n) ARDLORA_INLINE_LAMBDA {
      tile.template operator()<Rows, Vecs>(m, n);
    });
  });
}

template <typename YT>
void expand(const ExpandArgs& a) {
  for (const ColumnSegment* s = a.segments; s != a.segments + a.n_segments; ++s) {
    if (a.keep != nullptr) {
      expand_segment<Operands<YT>, true, YT>(a, *s);
    } else {
      expand_segment<Operands<YT>, false, YT>(a, *s);
    }
  }
}
