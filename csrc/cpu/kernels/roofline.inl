// What the machine can do at best: independent multiply-adds in registers, and passes over memory.
inline Vec chain_start(std::int64_t chain) { return Vec::broadcast(static_cast<float>(chain + 1)); }

// acc <- acc * a + b: bounded, and no chain is another's copy that a compiler may drop.
inline float fma_loop(std::int64_t steps) {
  Vec acc[kPeakChains];
  for (std::int64_t c = 0; c < kPeakChains; ++c) acc[c] = chain_start(c);
  const Vec a = Vec::broadcast(0.5f), b = Vec::broadcast(0.25f);
  for (std::int64_t i = 0; i < steps; ++i) {
    for (std::int64_t c = 0; c < kPeakChains; ++c) acc[c] = Vec::fma(acc[c], a, b);
  }
  for (std::int64_t c = 1; c < kPeakChains; ++c) acc[0] = Vec::add(acc[0], acc[c]);
  return acc[0].sum();
}

#ifdef ARDLORA_ISA_HAS_PAIRS
// acc <- acc + a . b with tiny products; 2 * lanes multiply-adds each.
inline float pair_loop(std::int64_t steps) {
  Vec acc[kPeakChains];
  for (std::int64_t c = 0; c < kPeakChains; ++c) acc[c] = chain_start(c);
  const Pairs a = Pairs::broadcast(1e-6f), b = Pairs::broadcast(0.5f);
  for (std::int64_t i = 0; i < steps; ++i) {
    for (std::int64_t c = 0; c < kPeakChains; ++c) acc[c] = Pairs::madd(a, b, acc[c]);
  }
  for (std::int64_t c = 1; c < kPeakChains; ++c) acc[0] = Vec::add(acc[0], acc[c]);
  return acc[0].sum();
}
#else
inline constexpr PeakLoopFn pair_loop = nullptr;
#endif

inline float stream_read(const float* p, std::int64_t n) {
  Vec acc[8];
  for (std::int64_t c = 0; c < 8; ++c) acc[c] = Vec::zero();
  for (std::int64_t i = 0; i + 8 * Vec::kWidth <= n; i += 8 * Vec::kWidth) {
    for (std::int64_t c = 0; c < 8; ++c) acc[c] = Vec::add(acc[c], Vec::load(p + i + c * Vec::kWidth));
  }
  for (std::int64_t c = 1; c < 8; ++c) acc[0] = Vec::add(acc[0], acc[c]);
  return acc[0].sum();
}

inline void stream_update(float* p, std::int64_t n) {
  const Vec one = Vec::broadcast(1.0f);
  for (std::int64_t i = 0; i + 4 * Vec::kWidth <= n; i += 4 * Vec::kWidth) {
    for (std::int64_t c = 0; c < 4; ++c) {
      Vec::add(Vec::load(p + i + c * Vec::kWidth), one).store(p + i + c * Vec::kWidth);
    }
  }
}
