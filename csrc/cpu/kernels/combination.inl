// out += sum_j coefficients[j] rows[j], over n contiguous elements of each of `count` rows; summed in float, rounded
// once.
template <typename T>
void add_combination(const float* coefficients, const void* rows, std::int64_t count, std::int64_t n, void* out) {
  const T* from = static_cast<const T*>(rows);
  T* to = static_cast<T*>(out);
  std::int64_t i = 0;
  for (; i + 4 * Vec::kWidth <= n; i += 4 * Vec::kWidth) {
    Vec acc[4];
    unroll<4>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA { acc[V] = Vec::load(to + i + V * Vec::kWidth); });
    for (std::int64_t j = 0; j < count; ++j) {
      const Vec c = Vec::broadcast(coefficients[j]);
      const T* row = from + j * n + i;
      unroll<4>([&]<std::int64_t V>()
                    ARDLORA_INLINE_LAMBDA { acc[V] = Vec::fma(c, Vec::load(row + V * Vec::kWidth), acc[V]); });
    }
    unroll<4>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA { acc[V].store(to + i + V * Vec::kWidth); });
  }
  for (; i < n; i += Vec::kWidth) {
    const std::int64_t left = n - i < Vec::kWidth ? n - i : Vec::kWidth;
    Vec acc = Vec::load(to + i, left);
    for (std::int64_t j = 0; j < count; ++j) {
      acc = Vec::fma(Vec::broadcast(coefficients[j]), Vec::load(from + j * n + i, left), acc);
    }
    acc.store(to + i, left);
  }
}
