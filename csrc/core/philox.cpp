#include "ardlora/philox.h"

#include <cmath>

#include "ardlora/check.h"

namespace ardlora {

Dropout make_dropout(double p, std::uint64_t seed, const std::int64_t* rows, std::int64_t count) {
  ARDLORA_CHECK(p >= 0.0 && p < 1.0, "dropout: p must be in [0, 1), got ", p);
  const auto threshold = static_cast<std::uint32_t>(std::lround(p * 65536.0));
  return {seed, threshold, static_cast<float>(65536.0 / (65536.0 - threshold)), rows, count, nullptr};
}

}  // namespace ardlora
