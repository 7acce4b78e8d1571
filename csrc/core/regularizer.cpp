#include "ardlora/regularizer.h"

#include <algorithm>
#include <cmath>

#include "ardlora/check.h"

namespace ardlora {

void prox_step(const ProxParams& p) {
  ARDLORA_CHECK(p.step > 0.0, "prox_step: step must be > 0, got ", p.step);
  ARDLORA_CHECK(p.price >= 0.0, "prox_step: price must be >= 0, got ", p.price);
  ARDLORA_CHECK(p.tv >= 0.0, "prox_step: tv must be >= 0, got ", p.tv);
  const double step = p.step / (1.0 + p.step * p.price * p.tv);
  for (std::int64_t u = 0; u < p.units; ++u) {
    const double moved = p.alpha[u] - step * p.grad[u];
    const double shrunk = std::copysign(std::max(std::abs(moved) - step * p.price * p.weight[u], 0.0), moved);
    p.alpha[u] = std::clamp(shrunk, p.lo[u], p.hi[u]);
  }
}

double ramp_gate(double rho, std::int64_t j, double floor) {
  const double d = rho - static_cast<double>(j);
  if (j == 0 || d >= 1.0) return 1.0;
  if (d >= 0.0) return std::max(d, floor);
  return std::max(floor * (1.0 + d), 0.0);
}

void ramp_gates(const std::vector<GateBlock>& blocks, const double* rho, double floor) {
  for (std::size_t u = 0; u < blocks.size(); ++u) {
    for (std::int64_t j = 0; j < blocks[u].count; ++j) {
      blocks[u].gate[j] = static_cast<float>(ramp_gate(rho[u], j, floor));
    }
  }
}

}  // namespace ardlora
