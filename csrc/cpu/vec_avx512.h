// Sixteen floats: AVX-512 F, BW, DQ, VL.
struct Vec {
  static constexpr std::int64_t kWidth = 16;
  static constexpr std::int64_t kShrinkRows = 4, kShrinkRanks = 4;  // 32 registers
  static constexpr std::int64_t kExpandRows = 4, kExpandVecs = 4;
  static constexpr std::int64_t kOuterRanks = 8, kOuterVecs = 2;
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
  float sum() const { return _mm512_reduce_add_ps(v); }

 private:
  static __mmask16 mask(std::int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static Vec widen(__m256i half) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))}; }
  __m256i half() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  __m256i round() const {  // to nearest even; NaN becomes a quiet NaN
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x00400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
};

struct Words {
  __m512i v;

  static Words set(std::uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  static Words iota(std::uint32_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_add_epi32(set(first).v, lanes)};
  }
  static Words exclusive_or(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
  static void mul(std::uint32_t m, Words a, Words* hi, Words* lo) {
    const __m512i factor = set(m).v;
    const __m512i even = _mm512_mul_epu32(a.v, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
    hi->v = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    lo->v = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  }
  void factors(std::uint32_t threshold, float keep, float* low, float* high) const {
    const __m512i limit = set(threshold).v;
    const __mmask16 keep_low = _mm512_cmpge_epu32_mask(_mm512_and_si512(v, _mm512_set1_epi32(0xffff)), limit);
    const __mmask16 keep_high = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(v, 16), limit);
    _mm512_storeu_ps(low, _mm512_maskz_mov_ps(keep_low, _mm512_set1_ps(keep)));
    _mm512_storeu_ps(high, _mm512_maskz_mov_ps(keep_high, _mm512_set1_ps(keep)));
  }
};
