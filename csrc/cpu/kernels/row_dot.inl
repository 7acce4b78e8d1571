// <a, b> over n contiguous elements.
template <typename T, typename U>
float row_dot(const void* a, const void* b, std::int64_t n) {
  const T* pa = static_cast<const T*>(a);
  const U* pb = static_cast<const U*>(b);
  Vec acc[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  std::int64_t i = 0;
  for (; i + 4 * Vec::kWidth <= n; i += 4 * Vec::kWidth) {
    for (std::int64_t v = 0; v < 4; ++v) {
      acc[v] = Vec::fma(Vec::load(pa + i + v * Vec::kWidth), Vec::load(pb + i + v * Vec::kWidth), acc[v]);
    }
  }
  for (; i < n; i += Vec::kWidth) {
    const std::int64_t left = n - i < Vec::kWidth ? n - i : Vec::kWidth;
    acc[0] = left == Vec::kWidth ? Vec::fma(Vec::load(pa + i), Vec::load(pb + i), acc[0])
                                 : Vec::fma(Vec::load(pa + i, left), Vec::load(pb + i, left), acc[0]);
  }
  return Vec::add(Vec::add(acc[0], acc[1]), Vec::add(acc[2], acc[3])).sum();
}
