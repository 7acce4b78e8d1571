// Eight floats: AVX2 + FMA + F16C.
struct Vec {
  static constexpr std::int64_t kWidth = 8;
  static constexpr std::int64_t kShrinkTile = 8;  // 16 registers
  static constexpr std::int64_t kExpandRows = 4, kExpandVecs = 2;
  static constexpr std::int64_t kOuterRanks = 4, kOuterTile = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Vec load(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec load(const float* p, std::int64_t n) { return {_mm256_maskload_ps(p, mask(n))}; }
  template <typename T>
  static Vec load(const T* p, std::int64_t n) {
    T full[kWidth] = {};
    for (std::int64_t i = 0; i < n; ++i) full[i] = p[i];
    return load(full);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BFloat16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round()); }
  void store(Float16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(float* p, std::int64_t n) const { _mm256_maskstore_ps(p, mask(n), v); }
  template <typename T>
  void store(T* p, std::int64_t n) const {
    T full[kWidth];
    store(full);
    for (std::int64_t i = 0; i < n; ++i) p[i] = full[i];
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  template <std::int64_t Group>
  static Vec repeat(const float* p) {
    if constexpr (Group == 1) return {_mm256_broadcast_ss(p)};
    if constexpr (Group == 2) {
      const __m128i two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      return {_mm256_castsi256_ps(_mm256_broadcastq_epi64(two))};
    }
    if constexpr (Group == 8) return load(p);
  }
  static Vec pair_sum(Vec a, Vec b) {
    const __m256d pairs = _mm256_castps_pd(_mm256_hadd_ps(a.v, b.v));  // within halves: put in order
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xD8))};
  }
  Vec keep(std::uint32_t bits) const {
    const __m256i select = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), select);
    return {_mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, select)))};
  }
  Vec abs() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)}; }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

 private:
  static __m256i mask(std::int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  __m128i round() const {  // to nearest even; NaN becomes a quiet NaN
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  }
};

// Words 2i and 2i+1 are the low halves of the 64-bit lanes of `even` and `odd`, as multiplication wants them; the high
// halves are never read.
struct Words {
  __m256i even, odd;

  static Words set(std::uint32_t x) {
    const __m256i v = _mm256_set1_epi64x(x);
    return {v, v};
  }
  static Words iota(std::uint32_t first) {
    const __m256i even = _mm256_add_epi64(set(first).even, _mm256_setr_epi64x(0, 2, 4, 6));
    return {even, _mm256_add_epi64(even, _mm256_set1_epi64x(1))};
  }
  static Words exclusive_or(Words a, Words b, Words c) {
    return {_mm256_xor_si256(_mm256_xor_si256(a.even, b.even), c.even),
            _mm256_xor_si256(_mm256_xor_si256(a.odd, b.odd), c.odd)};
  }
  static void mul(std::uint32_t m, Words a, Words* hi, Words* lo) {
    const __m256i factor = _mm256_set1_epi64x(m);
    *lo = {_mm256_mul_epu32(a.even, factor), _mm256_mul_epu32(a.odd, factor)};
    *hi = {_mm256_srli_epi64(lo->even, 32), _mm256_srli_epi64(lo->odd, 32)};
  }
  std::uint32_t not_below(std::uint32_t threshold) const {
    const __m256i v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    const __m256i last = _mm256_set1_epi32(static_cast<int>(threshold) - 1);  // 16-bit values compare as signed
    const __m256i low = _mm256_cmpgt_epi32(_mm256_and_si256(v, _mm256_set1_epi32(0xffff)), last);
    const __m256i high = _mm256_cmpgt_epi32(_mm256_srli_epi32(v, 16), last);
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(low))) |
           static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(high))) << 16;
  }
};
