// H[m, h+j] += c_j * sum_k X[m, col+k] W[w+j, k]: lanes run along the sum, a tile of rows x vectors of ranks in
// registers. A group of G lanes serves one rank, each lane every G-th step of its sum: whole vectors where rows are
// wide, parts of one where adding up the lanes would take as long as the sum. A tile has kVecs * kWidth / G ranks, as
// few vectors as hold them: how many they are moves no bit of a component's sum. The sum is cut at multiples of
// kShrinkBlock, so that a block of the panels stays in the L2 cache for all rows.
inline constexpr std::int64_t kShrinkBlock = 2048;

// Lane [q, g] of step s of a panel is W[q, (s * G + g)] in units of kDepth elements, Vecs vectors per step.
template <typename Ops, std::int64_t Group, std::int64_t Vecs, typename WT>
void pack_rank_tile(const RankTile& t, const WT* w, std::int64_t w_stride, std::int64_t width, std::int64_t k_begin,
                    std::int64_t k_end, typename Ops::Lane* panel) {
  using Lane = typename Ops::Lane;
  constexpr std::int64_t kChunk = Vec::kWidth * Ops::kDepth, kStep = Group * Ops::kDepth;
  constexpr std::int64_t kRanks = Vecs * Vec::kWidth / Group;
  for (std::int64_t q = 0; q < kRanks; ++q) {
    for (std::int64_t k = k_begin; k < k_end; k += kChunk) {
      Lane lanes[Vec::kWidth] = {};
      if (q < t.ranks) Ops::store(Ops::along(w + (t.w_row + q) * w_stride + k, width - k), lanes);
      Lane* out = panel + k / kStep * Vecs * Vec::kWidth + q * Group;
      for (std::int64_t g = 0; g < Vec::kWidth / Group && k + g * kStep < width; ++g) {
        __builtin_memcpy(out + g * Vecs * Vec::kWidth, lanes + g * Group, Group * sizeof(Lane));
      }
    }
  }
}

template <typename Ops, std::int64_t Group, std::int64_t Rows, std::int64_t Vecs>
ARDLORA_INLINE void shrink_tile(const typename Ops::Lane* panel, std::int64_t width, const typename Ops::Elem* x,
                                std::int64_t x_stride, Vec (&acc)[Rows][Vecs]) {
  using Elem = typename Ops::Elem;
  constexpr std::int64_t kStep = Group * Ops::kDepth;
  clear(acc);
  const auto step = [&](auto row) ARDLORA_INLINE_LAMBDA {
    typename Ops::Operand w[Vecs];
    unroll<Vecs>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA { w[V] = Ops::load(panel + V * Vec::kWidth); });
    panel += Vecs * Vec::kWidth;
    unroll<Rows>([&]<std::int64_t R>() ARDLORA_INLINE_LAMBDA {
      const auto xs = Ops::template repeat<Group>(row(R));
      unroll<Vecs>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA { acc[R][V] = Ops::madd(xs, w[V], acc[R][V]); });
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

// The sums of all groups of the first N vectors, side by side at the beginning of `acc`.
template <std::int64_t Group, std::int64_t N, std::int64_t Rows, std::int64_t Vecs>
ARDLORA_INLINE void sum_groups(Vec (&acc)[Rows][Vecs]) {
  if constexpr (Group > 1) {
    constexpr std::int64_t kHalf = (N + 1) / 2;
    unroll<kHalf>([&]<std::int64_t I>() ARDLORA_INLINE_LAMBDA {
      constexpr std::int64_t kFirst = 2 * I, kSecond = N > 1 ? kFirst + 1 : kFirst;
      acc[I / Vecs][I % Vecs] = Vec::pair_sum(acc[kFirst / Vecs][kFirst % Vecs], acc[kSecond / Vecs][kSecond % Vecs]);
    });
    sum_groups<Group / 2, kHalf>(acc);
  }
}

template <typename Ops, std::int64_t Group, std::int64_t Vecs>
inline void shrink_rank_tile(const ShrinkArgs& a, const RankTile& t, std::int64_t k, std::int64_t width) {
  using Elem = typename Ops::Elem;
  constexpr std::int64_t kRanks = Vecs * Vec::kWidth / Group;
  constexpr std::int64_t kLanes = kRanks < Vec::kWidth ? Vec::kWidth : kRanks, kOut = kLanes / Vec::kWidth;
  constexpr std::int64_t kRows = Vec::kShrinkTile / Vecs < 8 ? Vec::kShrinkTile / Vecs : 8;
  const auto* panel =
      static_cast<const typename Ops::Lane*>(a.panels) + t.panel + k / (Group * Ops::kDepth) * Vecs * Vec::kWidth;
  float factors[kLanes] = {};  // of the ranks, again and again
  for (std::int64_t i = 0; i < kLanes; ++i) {
    const std::int64_t q = i % kRanks;
    if (q < t.ranks) factors[i] = a.row_scale == nullptr ? a.scale : a.scale * a.row_scale[t.w_row + q];
  }
  for_tiles<kRows>(0, a.rows, [&]<std::int64_t Rows>(std::int64_t m) {
    Vec acc[Rows][Vecs];
    shrink_tile<Ops, Group>(panel, width, static_cast<const Elem*>(a.x) + m * a.x_stride + t.x_col + k, a.x_stride,
                            acc);
    sum_groups<Group, Rows * Vecs>(acc);  // of all rows at once: fewer steps
    constexpr std::int64_t kFull = (Rows * kRanks + Vec::kWidth - 1) / Vec::kWidth;
    float sums[kFull * Vec::kWidth];
    unroll<kFull>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA {
      Vec::mul(acc[V / Vecs][V % Vecs], Vec::load(factors + V % kOut * Vec::kWidth)).store(sums + V * Vec::kWidth);
    });
    // Element by element: a masked vector would wait until the sums have left for the cache.
    for (std::int64_t r = 0; r < Rows; ++r) {
      float* h = a.h + (m + r) * a.h_stride + t.h_col;
      if (t.ranks == kRanks) {
        for (std::int64_t q = 0; q < kRanks; ++q) h[q] += sums[r * kRanks + q];
      } else {
        for (std::int64_t q = 0; q < kRanks && q < t.ranks; ++q) h[q] += sums[r * kRanks + q];
      }
    }
  });
}

// Calls f<Group, Vecs>() for the tile's: one of the two groups of `rank_tiles`, one to four vectors.
template <typename F>
inline void for_tile(const RankTile& t, F&& f) {
  const auto sized = [&]<std::int64_t Group>() {
    if (t.vecs == 1) {
      f.template operator()<Group, 1>();
    } else if (t.vecs == 2) {
      f.template operator()<Group, 2>();
    } else {
      f.template operator()<Group, 4>();
    }
  };
  if (t.group == Vec::kWidth) {
    sized.template operator()<Vec::kWidth>();
  } else {
    sized.template operator()<(Vec::kWidth > 4 ? Vec::kWidth / 4 : 1)>();
  }
}

template <typename Ops, typename WT>
void pack_shrink(const RankTile& t, const void* w, std::int64_t w_stride, std::int64_t width, std::int64_t k_begin,
                 std::int64_t k_end, void* panels) {
  auto* panel = static_cast<typename Ops::Lane*>(panels) + t.panel;
  for_tile(t, [&]<std::int64_t Group, std::int64_t Vecs>() {
    pack_rank_tile<Ops, Group, Vecs>(t, static_cast<const WT*>(w), w_stride, width, k_begin, k_end, panel);
  });
}

template <typename Ops>
void shrink(const ShrinkArgs& a) {
  for (std::int64_t k = 0; k < a.width; k += kShrinkBlock) {
    const std::int64_t width = a.width - k < kShrinkBlock ? a.width - k : kShrinkBlock;
    for (const RankTile* t = a.tiles; t != a.tiles + a.n_tiles; ++t) {
      for_tile(*t,
               [&]<std::int64_t Group, std::int64_t Vecs>() { shrink_rank_tile<Ops, Group, Vecs>(a, *t, k, width); });
    }
  }
}
