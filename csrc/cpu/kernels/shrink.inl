// H[m, h+j] += c_j * sum_k X[m, col+k] W[w+j, k]: lanes are ranks, x is broadcast, a tile of rows x two vectors of
// ranks in registers. A group of G lanes serves one rank, each lane every G-th step of its sum, so that few ranks fill
// the vectors too: a tile has 2 * kWidth / G ranks. The sum is cut at multiples of kShrinkBlock, so that a block of the
// panels stays in the L2 cache for all rows.
inline constexpr std::int64_t kShrinkBlock = 2048;

// Lane [q, g] of step s of a panel is W[q, (s * G + g)] in units of kDepth elements, two vectors per step.
template <typename Ops, std::int64_t Group, typename WT>
void pack_rank_tile(const RankTile& t, const WT* w, std::int64_t w_stride, std::int64_t width, std::int64_t k_begin,
                    std::int64_t k_end, typename Ops::Lane* panel) {
  using Lane = typename Ops::Lane;
  constexpr std::int64_t kChunk = Vec::kWidth * Ops::kDepth, kStep = Group * Ops::kDepth;
  constexpr std::int64_t kRanks = 2 * Vec::kWidth / Group;
  for (std::int64_t q = 0; q < kRanks; ++q) {
    for (std::int64_t k = k_begin; k < k_end; k += kChunk) {
      Lane lanes[Vec::kWidth] = {};
      if (q < t.ranks) Ops::store(Ops::along(w + (t.w_row + q) * w_stride + k, width - k), lanes);
      Lane* out = panel + k / kStep * 2 * Vec::kWidth + q * Group;
      for (std::int64_t g = 0; g < Vec::kWidth / Group && k + g * kStep < width; ++g) {
        __builtin_memcpy(out + g * 2 * Vec::kWidth, lanes + g * Group, Group * sizeof(Lane));
      }
    }
  }
}

template <typename Ops, std::int64_t Group, std::int64_t Rows>
ARDLORA_INLINE void shrink_tile(const typename Ops::Lane* panel, std::int64_t width, const typename Ops::Elem* x,
                                std::int64_t x_stride, Vec (&acc)[Rows][2]) {
  using Elem = typename Ops::Elem;
  constexpr std::int64_t kStep = Group * Ops::kDepth;
  clear(acc);
  const auto step = [&](auto row) ARDLORA_INLINE_LAMBDA {
    const auto w0 = Ops::load(panel), w1 = Ops::load(panel + Vec::kWidth);
    panel += 2 * Vec::kWidth;
    unroll<Rows>([&]<std::int64_t R>() ARDLORA_INLINE_LAMBDA {
      const auto xs = Ops::template repeat<Group>(row(R));
      acc[R][0] = Ops::madd(xs, w0, acc[R][0]);
      acc[R][1] = Ops::madd(xs, w1, acc[R][1]);
    });
  };
  std::int64_t k = 0;
  for (; k + kStep <= width; k += kStep) step([&](std::int64_t r) { return x + r * x_stride + k; });
  if (k < width) {
    Elem rest[Rows][kStep] = {};
    for (std::int64_t r = 0; r < Rows; ++r) {
      for (std::int64_t i = 0; i < width - k; ++i) rest[r][i] = x[r * x_stride + k + i];
    }
    step([&](std::int64_t r) { return rest[r]; });
  }
}

// The tile's ranks, one to a lane; the sums of groups of one lane fill both vectors.
template <std::int64_t Group>
ARDLORA_INLINE void sum_groups(Vec (&acc)[2]) {
  if constexpr (Group > 1) acc[0] = Vec::pair_sum(acc[0], acc[1]);
  if constexpr (Group > 2) {
    acc[1] = acc[0];
    sum_groups<Group / 2>(acc);
  }
}

template <typename Ops, std::int64_t Group>
inline void shrink_rank_tile(const ShrinkArgs& a, const RankTile& t, std::int64_t k, std::int64_t width) {
  using Elem = typename Ops::Elem;
  constexpr std::int64_t kVecs = Group == 1 ? 2 : 1;
  const auto* panel =
      static_cast<const typename Ops::Lane*>(a.panels) + t.panel + k / (Group * Ops::kDepth) * 2 * Vec::kWidth;
  std::int64_t count[kVecs];
  Vec c[kVecs];
  for (std::int64_t v = 0; v < kVecs; ++v) {
    const std::int64_t left = t.ranks - v * Vec::kWidth;
    count[v] = left < 0 ? 0 : left < Vec::kWidth ? left : Vec::kWidth;
    c[v] = Vec::broadcast(a.scale);
    if (a.row_scale != nullptr) c[v] = Vec::mul(c[v], Vec::load(a.row_scale + t.w_row + v * Vec::kWidth, count[v]));
  }
  for_tiles<Vec::kShrinkRows>(0, a.rows, [&]<std::int64_t Rows>(std::int64_t m) {
    Vec acc[Rows][2];
    shrink_tile<Ops, Group>(panel, width, static_cast<const Elem*>(a.x) + m * a.x_stride + t.x_col + k, a.x_stride,
                            acc);
    unroll<Rows>([&]<std::int64_t R>() ARDLORA_INLINE_LAMBDA {
      sum_groups<Group>(acc[R]);
      float* h = a.h + (m + R) * a.h_stride + t.h_col;
      unroll<kVecs>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA {
        Vec::fma(c[V], acc[R][V], Vec::load(h + V * Vec::kWidth, count[V])).store(h + V * Vec::kWidth, count[V]);
      });
    });
  });
}

// Calls f<Group>() for the tile's group.
template <std::int64_t Group, typename F>
inline void for_group(std::int64_t group, F&& f) {
  if constexpr (Group <= Vec::kWidth) {
    if (group == Group) {
      f.template operator()<Group>();
    } else {
      for_group<2 * Group>(group, f);
    }
  }
}

template <typename Ops, typename WT>
void pack_shrink(const RankTile& t, const void* w, std::int64_t w_stride, std::int64_t width, std::int64_t k_begin,
                 std::int64_t k_end, void* panels) {
  auto* panel = static_cast<typename Ops::Lane*>(panels) + t.panel;
  for_group<1>(t.group, [&]<std::int64_t Group>() {
    pack_rank_tile<Ops, Group>(t, static_cast<const WT*>(w), w_stride, width, k_begin, k_end, panel);
  });
}

template <typename Ops>
void shrink(const ShrinkArgs& a) {
  for (std::int64_t k = 0; k < a.width; k += kShrinkBlock) {
    const std::int64_t width = a.width - k < kShrinkBlock ? a.width - k : kShrinkBlock;
    for (const RankTile* t = a.tiles; t != a.tiles + a.n_tiles; ++t) {
      for_group<1>(t->group, [&]<std::int64_t Group>() { shrink_rank_tile<Ops, Group>(a, *t, k, width); });
    }
  }
}
