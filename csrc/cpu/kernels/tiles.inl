#if defined(__GNUC__)
#define ARDLORA_INLINE_LAMBDA __attribute__((always_inline))
#define ARDLORA_INLINE inline __attribute__((always_inline))
#else
#define ARDLORA_INLINE_LAMBDA
#define ARDLORA_INLINE inline
#endif

// Calls f<Size>(i) for whole tiles of `Tile`, then for halves, quarters ... of one: each size is a compile-time
// constant. One element's arithmetic never depends on the tile it falls into: that is what makes results independent of
// the row or column range a thread is given.
template <std::int64_t Tile, typename F>
ARDLORA_INLINE void for_tiles(std::int64_t begin, std::int64_t end, F&& f) {
  static_assert((Tile & (Tile - 1)) == 0);
  std::int64_t i = begin;
  for (; i + Tile <= end; i += Tile) f.template operator()<Tile>(i);
  if constexpr (Tile > 1) {
    if (i < end) for_tiles<Tile / 2>(i, end, f);
  }
}

// Bits of a row's bitmap from column `col` on, at least 32 of them.
inline std::uint64_t keep_at(const std::uint32_t* bitmap, std::int64_t col) {
  std::uint64_t bits;
  __builtin_memcpy(&bits, reinterpret_cast<const char*>(bitmap) + col / 8, sizeof bits);
  return bits >> (col % 8);
}

// f<0>(), f<1>(), ... f<N - 1>(): where indices are constants from the start, arrays of vectors live in registers
// alone; a loop that the compiler unrolls later leaves them on the stack.
template <std::int64_t N, std::int64_t I = 0, typename F>
ARDLORA_INLINE void unroll(const F& f) {
  if constexpr (I < N) {
    f.template operator()<I>();
    unroll<N, I + 1>(f);
  }
}

template <std::int64_t Rows, std::int64_t Vecs>
ARDLORA_INLINE void clear(Vec (&acc)[Rows][Vecs]) {
  unroll<Rows * Vecs>([&]<std::int64_t I>() ARDLORA_INLINE_LAMBDA { acc[I / Vecs][I % Vecs] = Vec::zero(); });
}

// Asks for the lines of `Vecs` vectors of elements, into L1 or, at locality 2, L2; reads nothing, so p may lie past the
// end.
template <std::int64_t Vecs, int Locality = 3, typename T>
ARDLORA_INLINE void prefetch(const T* p) {
  constexpr std::int64_t kBytes = Vecs * Vec::kWidth * static_cast<std::int64_t>(sizeof(T)), kLine = 64;
  unroll<(kBytes + kLine - 1) / kLine>([&]<std::int64_t I>() ARDLORA_INLINE_LAMBDA {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + I * kLine, 0, Locality);
  });
}
