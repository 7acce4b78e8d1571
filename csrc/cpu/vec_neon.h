// Four floats: NEON, the baseline of 64-bit Arm.
struct Vec {
  static constexpr std::int64_t kWidth = 4;
  static constexpr std::int64_t kShrinkTile = 16;  // 32 registers
  static constexpr std::int64_t kExpandRows = 4, kExpandVecs = 4;
  static constexpr std::int64_t kOuterRanks = 8, kOuterTile = 16;
  float32x4_t v;

  static Vec zero() { return {vdupq_n_f32(0.0f)}; }
  static Vec broadcast(float x) { return {vdupq_n_f32(x)}; }
  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load(const BFloat16* p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(halves(p)), 16))}; }
  static Vec load(const Float16* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves(p))))}; }
  template <typename T>
  static Vec load(const T* p, std::int64_t n) {
    T full[kWidth] = {};
    for (std::int64_t i = 0; i < n; ++i) full[i] = p[i];
    return load(full);
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store(BFloat16* p) const { vst1_u16(reinterpret_cast<std::uint16_t*>(p), round()); }
  void store(Float16* p) const { vst1_u16(reinterpret_cast<std::uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  template <typename T>
  void store(T* p, std::int64_t n) const {
    T full[kWidth];
    store(full);
    for (std::int64_t i = 0; i < n; ++i) p[i] = full[i];
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  static Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  template <std::int64_t Group>
  static Vec repeat(const float* p) {
    if constexpr (Group == 1) return {vld1q_dup_f32(p)};
    if constexpr (Group == 4) return load(p);
  }
  static Vec pair_sum(Vec a, Vec b) { return {vpaddq_f32(a.v, b.v)}; }
  Vec keep(std::uint32_t bits) const {
    const uint32x4_t chosen = vtstq_u32(vdupq_n_u32(bits), lane_bits());
    return {vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), chosen))};
  }
  Vec abs() const { return {vabsq_f32(v)}; }
  float sum() const { return vaddvq_f32(v); }

  static uint32x4_t lane_bits() {
    const std::uint32_t bits[kWidth] = {1, 2, 4, 8};
    return vld1q_u32(bits);
  }

 private:
  template <typename T>
  static const std::uint16_t* halves(const T* p) {
    return reinterpret_cast<const std::uint16_t*>(p);
  }
  uint16x4_t round() const {  // to nearest even; NaN becomes a quiet NaN
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), up, quiet), 16);
  }
};

struct Words {
  uint32x4_t v;

  static Words set(std::uint32_t x) { return {vdupq_n_u32(x)}; }
  static Words iota(std::uint32_t first) {
    const std::uint32_t steps[Vec::kWidth] = {0, 1, 2, 3};
    return {vaddq_u32(vdupq_n_u32(first), vld1q_u32(steps))};
  }
  static Words exclusive_or(Words a, Words b, Words c) { return {veorq_u32(veorq_u32(a.v, b.v), c.v)}; }
  static void mul(std::uint32_t m, Words a, Words* hi, Words* lo) {
    const uint32x4_t factor = vdupq_n_u32(m);
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a.v), vget_low_u32(factor)));
    const uint32x4_t second = vreinterpretq_u32_u64(vmull_high_u32(a.v, factor));
    *lo = {vuzp1q_u32(first, second)};
    *hi = {vuzp2q_u32(first, second)};
  }
  std::uint32_t not_below(std::uint32_t threshold) const {
    const uint32x4_t limit = vdupq_n_u32(threshold);
    const uint32x4_t low = vcgeq_u32(vandq_u32(v, vdupq_n_u32(0xffff)), limit);
    const uint32x4_t high = vcgeq_u32(vshrq_n_u32(v, 16), limit);
    return vaddvq_u32(vandq_u32(low, Vec::lane_bits())) | vaddvq_u32(vandq_u32(high, Vec::lane_bits())) << 16;
  }
};
