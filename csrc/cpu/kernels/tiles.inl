// Calls f<Tile>() for whole tiles and f<1..Tile-1>() for the rest, so that each tile size is a compile-time constant.
// One element's arithmetic never depends on the tile it falls into: that is what makes results independent of the
// row or column range a thread is given.
template <std::int64_t Size, typename F>
inline void tail_tile(std::int64_t begin, std::int64_t left, F&& f) {
  if constexpr (Size > 0) {
    if (left == Size) {
      f.template operator()<Size>(begin);
    } else {
      tail_tile<Size - 1>(begin, left, f);
    }
  }
}

template <std::int64_t Tile, typename F>
inline void for_tiles(std::int64_t begin, std::int64_t end, F&& f) {
  std::int64_t i = begin;
  for (; i + Tile <= end; i += Tile) f.template operator()<Tile>(i);
  tail_tile<Tile - 1>(i, end - i, f);
}
