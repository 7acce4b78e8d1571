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

double gate_value(const GateParams& p, double rho, std::int64_t j) {
  const double d = rho - static_cast<double>(j);
  const bool inside = static_cast<double>(j) < std::floor(rho + 0.5);
  if (p.kind == GateKind::kScale) return inside || j == 0 ? rho / p.width : p.floor;
  if (j == 0 || (p.kind == GateKind::kRamp && d >= 1.0)) return 1.0;
  if (p.kind == GateKind::kHard) return inside ? 1.0 : p.floor;
  if (p.kind == GateKind::kSigmoid) return 1.0 / (1.0 + std::exp((0.5 - d) / p.width));
  return d >= 0.0 ? std::max(d, p.floor) : std::max(p.floor * (1.0 + d), 0.0);
}

void set_gates(const std::vector<GateBlock>& blocks, const double* rho, const GateParams& p) {
  ARDLORA_CHECK(p.width > 0.0, "set_gates: width must be > 0, got ", p.width);
  for (std::size_t u = 0; u < blocks.size(); ++u) {
    for (std::int64_t j = 0; j < blocks[u].count; ++j) {
      blocks[u].gate[j] = static_cast<float>(gate_value(p, rho[u], j));
    }
  }
}

}  // namespace ardlora
