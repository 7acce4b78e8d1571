// Pairs of bf16 in the 32-bit lanes of AVX-512: acc + a.first * b.first + a.second * b.second.
struct Pairs {
  __m512i v;

  static Pairs broadcast(float x) { return {_mm512_set1_epi32(static_cast<int>(pair(x, x)))}; }
  static Vec fma(Pairs a, Pairs b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }

 private:
  static std::uint32_t pair(float a, float b) {
    return from_float<BFloat16>(a).bits | static_cast<std::uint32_t>(from_float<BFloat16>(b).bits) << 16;
  }
};
