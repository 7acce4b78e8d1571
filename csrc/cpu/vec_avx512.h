// Sixteen floats: AVX-512 F, BW, DQ, VL.
struct Vec {
  static constexpr std::int64_t kWidth = 16;
  static constexpr std::int64_t kShrinkTile = 16;  // 32 registers
  static constexpr std::int64_t kExpandRows = 4, kExpandVecs = 4;
  static constexpr std::int64_t kOuterRanks = 8, kOuterTile = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec load(const float* p, std::int64_t n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  static Vec load(const BFloat16* p, std::int64_t n) { return widen(_mm256_maskz_loadu_epi16(mask(n), p)); }
  static Vec load(const Float16* p, std::int64_t n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p))}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round()); }
  void store(Float16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half()); }
  void store(float* p, std::int64_t n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  void store(BFloat16* p, std::int64_t n) const { _mm256_mask_storeu_epi16(p, mask(n), round()); }
  void store(Float16* p, std::int64_t n) const { _mm256_mask_storeu_epi16(p, mask(n), half()); }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  template <std::int64_t Group>
  static Vec repeat(const float* p) {
    if constexpr (Group == 1) return broadcast(*p);
    if constexpr (Group == 4) return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))};
    if constexpr (Group == 16) return load(p);
  }
  static Vec pair_sum(Vec a, Vec b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return {_mm512_add_ps(_mm512_permutex2var_ps(a.v, even, b.v), _mm512_permutex2var_ps(a.v, odd, b.v))};
  }
  Vec keep(std::uint32_t bits) const { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v)}; }
  Vec abs() const { return {_mm512_abs_ps(v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }

 private:
  static __mmask16 mask(std::int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static Vec widen(__m256i half) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))}; }
  __m256i half() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#ifdef ARDLORA_ISA_HAS_PAIRS
  __m256i round() const { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }  // subnormals become 0
#else
  __m256i round() const {  // to nearest even; NaN becomes a quiet NaN
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x00400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
#endif
};

// Words 2i and 2i+1 are the low halves of the 64-bit lanes of `even` and `odd`, as multiplication wants them; the high
// halves are never read.
struct Words {
  __m512i even, odd;

  static Words set(std::uint32_t x) {
    const __m512i v = _mm512_set1_epi64(x);
    return {v, v};
  }
  static Words iota(std::uint32_t first) {
    const __m512i even = _mm512_add_epi64(set(first).even, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14));
    return {even, _mm512_add_epi64(even, _mm512_set1_epi64(1))};
  }
  static Words exclusive_or(Words a, Words b, Words c) {
    return {_mm512_ternarylogic_epi64(a.even, b.even, c.even, 0x96),
            _mm512_ternarylogic_epi64(a.odd, b.odd, c.odd, 0x96)};
  }
  static void mul(std::uint32_t m, Words a, Words* hi, Words* lo) {
    const __m512i factor = _mm512_set1_epi64(m);
    *lo = {_mm512_mul_epu32(a.even, factor), _mm512_mul_epu32(a.odd, factor)};
    *hi = {_mm512_srli_epi64(lo->even, 32), _mm512_srli_epi64(lo->odd, 32)};
  }
  std::uint32_t not_below(std::uint32_t threshold) const {
    const __m512i v = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
    const __m512i limit = _mm512_set1_epi32(static_cast<int>(threshold));
    const __mmask16 low = _mm512_cmpge_epu32_mask(_mm512_and_si512(v, _mm512_set1_epi32(0xffff)), limit);
    const __mmask16 high = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(v, 16), limit);
    return static_cast<std::uint32_t>(low) | static_cast<std::uint32_t>(high) << 16;
  }
};
