// One float at a time: the specification of Vec, and the fall-back of every CPU.
// Vec: kWidth lanes; load/store of float, bf16 and fp16, whole or the first n lanes; fma(a, b, c) = a*b + c;
// repeat<G>: lane i is p[i % G]; pair_sum: sums of neighbours, those of a, then those of b; keep: lanes whose bit is 0
// become 0.
struct Vec {
  static constexpr std::int64_t kWidth = 1;
  static constexpr std::int64_t kShrinkTile = 4;  // register tiles of the kernels, powers of two
  static constexpr std::int64_t kExpandRows = 2, kExpandVecs = 4;
  static constexpr std::int64_t kOuterRanks = 4, kOuterTile = 8;
  float v;

  static Vec zero() { return {0.0f}; }
  static Vec broadcast(float x) { return {x}; }
  template <typename T>
  static Vec load(const T* p) {
    return {to_float(*p)};
  }
  template <typename T>
  static Vec load(const T* p, std::int64_t n) {
    return n > 0 ? load(p) : zero();
  }
  template <typename T>
  void store(T* p) const {
    *p = from_float<T>(v);
  }
  template <typename T>
  void store(T* p, std::int64_t n) const {
    if (n > 0) store(p);
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  static Vec add(Vec a, Vec b) { return {a.v + b.v}; }
  static Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
  template <std::int64_t Group>
  static Vec repeat(const float* p) {
    return {*p};
  }
  static Vec pair_sum(Vec a, Vec) { return a; }  // of a single lane: never asked for
  Vec keep(std::uint32_t bits) const { return {(bits & 1u) != 0 ? v : 0.0f}; }
  Vec abs() const { return {v < 0.0f ? -v : v}; }
  float sum() const { return v; }
};

// The same number of 32-bit words, for Philox: mul gives the high and low halves of m * a. not_below has a bit for each
// lane whose low 16 bits reach the threshold, and 16 bits higher those of the high halves.
struct Words {
  std::uint32_t v;

  static Words set(std::uint32_t x) { return {x}; }
  static Words iota(std::uint32_t first) { return {first}; }
  static Words exclusive_or(Words a, Words b, Words c) { return {a.v ^ b.v ^ c.v}; }
  static void mul(std::uint32_t m, Words a, Words* hi, Words* lo) {
    const std::uint64_t product = std::uint64_t{m} * a.v;
    hi->v = static_cast<std::uint32_t>(product >> 32);
    lo->v = static_cast<std::uint32_t>(product);
  }
  std::uint32_t not_below(std::uint32_t threshold) const {
    return static_cast<std::uint32_t>((v & 0xffffu) >= threshold) | static_cast<std::uint32_t>((v >> 16) >= threshold)
                                                                        << 16;
  }
};
