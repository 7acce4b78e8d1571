// How a product is taken. Operands lie in 32-bit lanes: one float, or where the instruction set multiplies them, two
// bf16 that follow each other along the sum (kDepth). Accumulators are float either way.
//
// along: lanes run along a row, n elements of it. across: lanes are n columns of kDepth rows. Masked operands take the
// bitmap of each row's columns, from column `col` on, and read 0 where the bit is 0.
//
// A row of Y is updated in pieces of kDepth vectors, whose lanes are in whatever order suits: `panel` packs the same
// columns of kDepth rows for that, `begin`, `add` and `end` are what becomes of accumulators before the products, after
// them, and once those of all rows have been added. Columns whose bit is 0 stay as they are. Vecs is a multiple of
// kDepth, `left` what there is of columns, Whole: enough of them.
struct FloatOperands {
  using Elem = float;  // of rows that are multiplied without being packed
  using Lane = float;  // of packed panels
  using Operand = Vec;
  static constexpr std::int64_t kDepth = 1;

  static Operand load(const Lane* p) { return Vec::load(p); }
  static void store(Operand a, Lane* p) { a.store(p); }
  template <std::int64_t Group>
  static Operand repeat(const Elem* p) {
    return Vec::repeat<Group>(p);
  }
  static Vec madd(Operand a, Operand b, Vec acc) { return Vec::fma(a, b, acc); }
  template <typename T>
  static Operand along(const T* p, std::int64_t n) {
    return n >= Vec::kWidth ? Vec::load(p) : Vec::load(p, n);
  }
  template <std::int64_t Vecs, bool Masked, typename T>
  static ARDLORA_INLINE void across(const T* first, const T*, const std::uint32_t* keep, const std::uint32_t*,
                                    std::int64_t col, std::int64_t n, Operand* out) {
    unroll<Vecs>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA {
      // Only a single vector may be cut.
      out[V] = Vecs == 1 ? along(first, n) : Vec::load(first + V * Vec::kWidth);
      if constexpr (Masked) out[V] = out[V].keep(static_cast<std::uint32_t>(keep_at(keep, col + V * Vec::kWidth)));
    });
  }

  template <typename T>
  static void panel(const T* first, const T*, std::int64_t left, Lane* out) {
    store(along(first, left), out);
  }
  template <bool Whole, std::int64_t Vecs, typename T>
  static ARDLORA_INLINE void begin(const T*, std::int64_t, Vec (&acc)[Vecs]) {
    unroll<Vecs>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA { acc[V] = Vec::zero(); });
  }
  template <bool Whole, bool Masked, std::int64_t Vecs, typename T>
  static ARDLORA_INLINE void add(const T* y, const std::uint32_t* keep, std::int64_t col, std::int64_t left,
                                 Vec (&acc)[Vecs]) {
    unroll<Vecs>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA {
      constexpr std::int64_t c = V * Vec::kWidth;
      if constexpr (Masked) acc[V] = acc[V].keep(static_cast<std::uint32_t>(keep_at(keep, col + c)));
      acc[V] = Vec::add(Whole ? Vec::load(y + c) : Vec::load(y + c, part(left - c)), acc[V]);
    });
  }
  template <bool Whole, bool Masked, std::int64_t Vecs, typename T>
  static ARDLORA_INLINE void end(const Vec (&acc)[Vecs], const std::uint32_t*, std::int64_t, std::int64_t left, T* y) {
    unroll<Vecs>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA {
      constexpr std::int64_t c = V * Vec::kWidth;
      if constexpr (Whole) acc[V].store(y + c);
      if constexpr (!Whole) acc[V].store(y + c, part(left - c));
    });
  }

 private:
  static std::int64_t part(std::int64_t left) { return left < Vec::kWidth ? left : Vec::kWidth; }
};

#ifdef ARDLORA_ISA_HAS_PAIRS
struct PairOperands {
  using Elem = BFloat16;
  using Lane = std::uint32_t;
  using Operand = Pairs;
  static constexpr std::int64_t kDepth = 2;

  static Operand load(const Lane* p) { return Pairs::load(p); }
  static void store(Operand a, Lane* p) { a.store(p); }
  template <std::int64_t Group>
  static Operand repeat(const Elem* p) {
    return Pairs::repeat<Group>(p);
  }
  static Vec madd(Operand a, Operand b, Vec acc) { return Pairs::madd(a, b, acc); }
  template <typename T>
  static Operand along(const T* p, std::int64_t n) {
    return n >= 2 * Vec::kWidth ? Pairs::along(p) : Pairs::along(p, n);
  }
  template <std::int64_t Vecs, bool Masked>
  static ARDLORA_INLINE void across(const Elem* first, const Elem* second, const std::uint32_t* keep_first,
                                    const std::uint32_t* keep_second, std::int64_t col, std::int64_t n, Operand* out) {
    const auto bits = [&](const std::uint32_t* keep, std::int64_t v) {
      return Masked ? keep_at(keep, col + v * Vec::kWidth) : ~std::uint64_t{0};
    };
    if constexpr (Vecs == 1) {
      const std::uint64_t cut = n >= Vec::kWidth ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1;
      out[0] = Pairs::zip_half(first, second, cut & bits(keep_first, 0), cut & bits(keep_second, 0));
    } else {
      static_assert(Vecs % 2 == 0);
      unroll<Vecs / 2>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA {
        constexpr std::int64_t c = 2 * V * Vec::kWidth;
        Pairs::zip<Masked>(first + c, second + c, bits(keep_first, 2 * V), bits(keep_second, 2 * V), out + 2 * V);
      });
    }
  }

  // Even columns, then odd ones. Sums begin with y: its rounding is far coarser than theirs.
  template <typename T>
  static void panel(const T* first, const T* second, std::int64_t left, Lane* out) {
    Vec a[2], b[2];
    Pairs::split(first, cut(left), a);
    Pairs::split(second, cut(left), b);
    for (std::int64_t v = 0; v < 2; ++v) store(Pairs::zip(a[v], b[v]), out + v * Vec::kWidth);
  }
  template <bool Whole, std::int64_t Vecs>
  static ARDLORA_INLINE void begin(const Elem* y, std::int64_t left, Vec (&acc)[Vecs]) {
    unroll<Vecs / 2>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA {
      constexpr std::int64_t c = 2 * V * Vec::kWidth;
      Pairs::split<Whole>(y + c, cut(left - c), acc + 2 * V);
    });
  }
  template <bool Whole, bool Masked, std::int64_t Vecs>
  static ARDLORA_INLINE void add(const Elem*, const std::uint32_t*, std::int64_t, std::int64_t, Vec (&)[Vecs]) {}
  template <bool Whole, bool Masked, std::int64_t Vecs>
  static ARDLORA_INLINE void end(const Vec (&acc)[Vecs], const std::uint32_t* keep, std::int64_t col, std::int64_t left,
                                 Elem* y) {
    unroll<Vecs / 2>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA {
      constexpr std::int64_t c = 2 * V * Vec::kWidth;
      const std::uint64_t bits = Masked ? keep_at(keep, col + c) : ~std::uint64_t{0};
      Pairs::join<Whole && !Masked>(acc[2 * V], acc[2 * V + 1], cut(left - c) & bits, y + c);
    });
  }

 private:
  static std::uint64_t cut(std::int64_t left) {
    return left >= 2 * Vec::kWidth ? ~std::uint64_t{0} : (std::uint64_t{1} << left) - 1;
  }
};

template <typename T>
struct OperandsOf {
  using Type = FloatOperands;
};
template <>
struct OperandsOf<BFloat16> {
  using Type = PairOperands;
};
template <typename T>
using Operands = typename OperandsOf<T>::Type;
#else
template <typename T>
using Operands = FloatOperands;
#endif
