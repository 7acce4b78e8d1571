// Pairs of bf16 in the 32-bit lanes of AVX-512. The product of pairs sums in float: acc + a.first * b.first +
// a.second * b.second; bf16 subnormals count as 0.
struct Pairs {
  __m512i v;

  static Pairs load(const std::uint32_t* p) { return {_mm512_loadu_si512(p)}; }
  void store(std::uint32_t* p) const { _mm512_storeu_si512(p, v); }
  static Pairs broadcast(float x) { return zip(Vec::broadcast(x), Vec::broadcast(x)); }
  static Vec madd(Pairs a, Pairs b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
  // Lane i holds the pair p[2 * (i % Group)], p[2 * (i % Group) + 1].
  template <std::int64_t Group>
  static Pairs repeat(const BFloat16* p) {
    if constexpr (Group == 1) {
      int pair;
      __builtin_memcpy(&pair, p, sizeof pair);
      return {_mm512_set1_epi32(pair)};
    } else {
      return {_mm512_castps_si512(Vec::repeat<Group>(reinterpret_cast<const float*>(p)).v)};
    }
  }

  // 32 neighbours of one row: lane i is elements 2i, 2i + 1.
  static Pairs along(const BFloat16* p) { return {_mm512_loadu_si512(p)}; }
  static Pairs along(const BFloat16* p, std::int64_t n) { return {_mm512_maskz_loadu_epi16(mask32(n), p)}; }
  static Pairs along(const float* p) { return join(Vec::load(p), Vec::load(p + 16)); }
  static Pairs along(const float* p, std::int64_t n) {
    return n <= 16 ? join(Vec::load(p, n), Vec::zero()) : join(Vec::load(p), Vec::load(p + 16, n - 16));
  }

  // Columns of two rows: lane i is column i of both. Elements whose bit is 0 are read as 0, and not touched.
  static Pairs zip(Vec first, Vec second) { return zip(half(first), half(second)); }
  static Pairs zip_half(const BFloat16* first, const BFloat16* second, std::uint64_t keep_first,
                        std::uint64_t keep_second) {
    return zip(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(keep_first), first),
               _mm256_maskz_loadu_epi16(static_cast<__mmask16>(keep_second), second));
  }
  template <bool Masked>
  static void zip(const BFloat16* first, const BFloat16* second, std::uint64_t keep_first, std::uint64_t keep_second,
                  Pairs* out) {
    const auto row = [](const BFloat16* p, std::uint64_t keep) {
      return Masked ? _mm512_maskz_loadu_epi16(static_cast<__mmask32>(keep), p) : _mm512_loadu_si512(p);
    };
    const __m512i a = row(first, keep_first), b = row(second, keep_second);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i low = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(32)), 16));
    out[0].v = _mm512_permutex2var_epi16(a, low, b);
    out[1].v = _mm512_permutex2var_epi16(a, _mm512_add_epi32(low, _mm512_set1_epi32(0x00100010)), b);
  }

  // 32 neighbours of one row as floats, the even ones and the odd ones; those whose bit is 0 are read as 0, and neither
  // read nor written. join rounds.
  template <bool Whole>
  static void split(const BFloat16* p, std::uint64_t bits, Vec* out) {
    __m512i all = Whole ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(static_cast<__mmask32>(bits), p);
#if defined(__GNUC__)
    __asm__("" : "+v"(all));  // or it would be read twice
#endif
    out[0].v = _mm512_castsi512_ps(_mm512_slli_epi32(all, 16));
    out[1].v = _mm512_castsi512_ps(_mm512_and_si512(all, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void split(const BFloat16* p, std::uint64_t bits, Vec* out) { split<false>(p, bits, out); }
  static void split(const float* p, std::uint64_t bits, Vec* out) {
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits >> 16), p + 16);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    out[0].v = _mm512_permutex2var_ps(low, even, high);
    out[1].v = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
  }
  template <bool Whole>
  static void join(Vec even, Vec odd, std::uint64_t bits, BFloat16* p) {
    const __m512i first =
        _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
                          0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
    const __m512i all = _mm512_permutexvar_epi16(first, join(even, odd).v);
    if constexpr (Whole) _mm512_storeu_si512(p, all);
    if constexpr (!Whole) _mm512_mask_storeu_epi16(p, static_cast<__mmask32>(bits), all);
  }

 private:
  static __mmask32 mask32(std::int64_t n) { return static_cast<__mmask32>((std::uint64_t{1} << n) - 1u); }
  static __m256i half(Vec a) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)); }
  static Pairs zip(__m256i first, __m256i second) {
    return {_mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16))};
  }
  static Pairs join(Vec low, Vec high) { return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v))}; }
};
