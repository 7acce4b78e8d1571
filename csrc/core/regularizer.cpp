#include "ardlora/regularizer.h"

#include <cmath>

#include "ardlora/check.h"
#include "core/regularizer_formulas.h"

namespace ardlora {

namespace {

// The step made smaller by the temporal TV: step / (1 + step * price * tv).
double damped_step(const ProxParams& p) {
  ARDLORA_CHECK(p.step > 0.0, "prox_step: step must be > 0, got ", p.step);
  ARDLORA_CHECK(p.price >= 0.0, "prox_step: price must be >= 0, got ", p.price);
  ARDLORA_CHECK(p.tv >= 0.0, "prox_step: tv must be >= 0, got ", p.tv);
  return p.step / (1.0 + p.step * p.price * p.tv);
}

}  // namespace

void check_gates(const GateParams& p) { ARDLORA_CHECK(p.width > 0.0, "set_gates: width must be > 0, got ", p.width); }

void prox_step(const ProxParams& p) {
  const double step = damped_step(p);
  for (std::int64_t u = 0; u < p.units; ++u) {
    const double moved = p.alpha[u] - step * p.grad[u];
    const double size = std::fabs(moved) - step * p.price * p.weight[u];
    const double shrunk = std::copysign(size < 0.0 ? 0.0 : size, moved);
    p.alpha[u] = shrunk < p.lo[u] ? p.lo[u] : (shrunk > p.hi[u] ? p.hi[u] : shrunk);
  }
}

double gate_value(const GateParams& p, double rho, std::int64_t j) { return gate_formula(p, rho, j); }

void set_gates(const std::vector<GateBlock>& blocks, const double* rho, const GateParams& p) {
  check_gates(p);
  for (std::size_t u = 0; u < blocks.size(); ++u) {
    for (std::int64_t j = 0; j < blocks[u].count; ++j) {
      blocks[u].gate[j] = static_cast<float>(gate_value(p, rho[u], j));
    }
  }
}

}  // namespace ardlora
