// Entries of a factor w and of its gradient g: I = |w g| (AdaLoRA, arXiv:2303.10512).

// 0 where every I is finite, else NaN.
template <typename T>
float importance_finite(const void* weight, const void* grad, std::int64_t n) {
  const T* w = static_cast<const T*>(weight);
  const T* g = static_cast<const T*>(grad);
  const Vec zero = Vec::zero();
  Vec acc[4] = {zero, zero, zero, zero};
  std::int64_t i = 0;
  for (; i + 4 * Vec::kWidth <= n; i += 4 * Vec::kWidth) {
    unroll<4>([&]<std::int64_t V>() ARDLORA_INLINE_LAMBDA {
      const std::int64_t at = i + V * Vec::kWidth;
      acc[V] = Vec::fma(Vec::mul(Vec::load(w + at), Vec::load(g + at)), zero, acc[V]);
    });
  }
  for (; i < n; i += Vec::kWidth) {
    const std::int64_t left = n - i < Vec::kWidth ? n - i : Vec::kWidth;
    acc[0] = Vec::fma(Vec::mul(Vec::load(w + i, left), Vec::load(g + i, left)), zero, acc[0]);
  }
  return Vec::add(Vec::add(acc[0], acc[1]), Vec::add(acc[2], acc[3])).sum();
}

// Ibar = b1 Ibar + (1 - b1) I, then Ubar = b2 Ubar + (1 - b2) |I - Ibar|.
template <typename T>
void importance_update(const void* weight, const void* grad, float* sensitivity, float* uncertainty, std::int64_t n,
                       double beta1, double beta2) {
  const T* w = static_cast<const T*>(weight);
  const T* g = static_cast<const T*>(grad);
  const Vec b1 = Vec::broadcast(static_cast<float>(beta1)), c1 = Vec::broadcast(static_cast<float>(1.0 - beta1));
  const Vec b2 = Vec::broadcast(static_cast<float>(beta2)), c2 = Vec::broadcast(static_cast<float>(1.0 - beta2));
  const Vec minus = Vec::broadcast(-1.0f);
  const auto entry = [&](Vec wv, Vec gv, Vec& ibar, Vec& ubar) {
    const Vec value = Vec::mul(wv, gv).abs();
    ibar = Vec::fma(c1, value, Vec::mul(b1, ibar));
    ubar = Vec::fma(c2, Vec::fma(minus, ibar, value).abs(), Vec::mul(b2, ubar));
  };
  std::int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) {
    Vec ibar = Vec::load(sensitivity + i), ubar = Vec::load(uncertainty + i);
    entry(Vec::load(w + i), Vec::load(g + i), ibar, ubar);
    ibar.store(sensitivity + i);
    ubar.store(uncertainty + i);
  }
  if (i < n) {
    const std::int64_t left = n - i;
    Vec ibar = Vec::load(sensitivity + i, left), ubar = Vec::load(uncertainty + i, left);
    entry(Vec::load(w + i, left), Vec::load(g + i, left), ibar, ubar);
    ibar.store(sensitivity + i, left);
    ubar.store(uncertainty + i, left);
  }
}
