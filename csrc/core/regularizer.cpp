#include "ardlora/regularizer.h"

#include <algorithm>
#include <cmath>
#include <vector>

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

void secant_slopes(const SecantParams& p, double* slopes) {
  ARDLORA_CHECK(p.width >= 1, "secant_slopes: spectrum must have columns, got ", p.width);
  for (std::int64_t u = 0; u < p.units; ++u) {
    ARDLORA_CHECK(p.live[u] >= 1, "secant_slopes: live ranks must be >= 1, got ", p.live[u]);
    ARDLORA_CHECK(std::isfinite(p.rho[u]), "secant_slopes: soft ranks must be finite, got ", p.rho[u]);
  }
  const float* dots = p.dots;
  for (std::int64_t u = 0; u < p.units; ++u) {
    const double* energy = p.spectrum + u * p.width;
    const std::int64_t last = std::min(p.live[u], p.width) - 1;
    const auto boundary = static_cast<std::int64_t>(std::clamp(p.rho[u], 0.0, static_cast<double>(last)));
    double dot = 0.0, total = 0.0;
    for (std::int64_t i = 0; i < p.live[u]; ++i) dot += static_cast<double>(dots[i]);
    for (std::int64_t i = 0; i < p.width; ++i) total += energy[i];
    p.fisher[u] = p.ema * p.fisher[u] + (1.0 - p.ema) * dot * dot;
    slopes[u] = total > 0.0 ? -std::sqrt(p.fisher[u] * energy[boundary] / total) : 0.0;
    dots += p.live[u];
  }
}

double unit_costs(const CostParams& p, double* marginal) {
  std::vector<double> largest(static_cast<std::size_t>(p.modules)), reaching(static_cast<std::size_t>(p.modules));
  double parameters = 0.0;
  for (std::int64_t u = 0; u < p.units; ++u) {
    ARDLORA_CHECK(p.module_of[u] >= 0 && p.module_of[u] < p.modules, "unit_costs: modules must be 0 to ", p.modules - 1,
                  ", got ", p.module_of[u]);
    double& most = largest[static_cast<std::size_t>(p.module_of[u])];
    most = std::max(most, p.ranks[u]);
    parameters += p.own[u] * p.ranks[u];
  }
  for (std::size_t m = 0; m < largest.size(); ++m) {
    parameters += p.common[m] * largest[m];
    largest[m] = largest[m] > 0.0 ? 1.0 / largest[m] : 0.0;
  }
  for (std::int64_t u = 0; u < p.units; ++u) {
    const auto m = static_cast<std::size_t>(p.module_of[u]);
    const double share = p.ranks[u] * largest[m], square = share * share, fourth = square * square;
    marginal[u] = fourth * fourth;
    reaching[m] += marginal[u];
  }
  for (std::size_t m = 0; m < reaching.size(); ++m) reaching[m] = reaching[m] > 0.0 ? p.common[m] / reaching[m] : 0.0;
  for (std::int64_t u = 0; u < p.units; ++u) {
    marginal[u] = p.own[u] + marginal[u] * reaching[static_cast<std::size_t>(p.module_of[u])];
  }
  return parameters;
}

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
    ARDLORA_CHECK(std::isfinite(rho[u]), "set_gates: soft ranks must be finite, got ", rho[u]);
    ARDLORA_CHECK(blocks[u].count >= 0, "set_gates: counts must be >= 0, got ", blocks[u].count);
  }
  for (std::size_t u = 0; u < blocks.size(); ++u) {
    const GateBlock& b = blocks[u];
    // A ramp is 1 up to its last two components: most gates need no formula.
    const double covered = p.kind == GateKind::kRamp ? std::clamp(rho[u], 0.0, static_cast<double>(b.count)) : 0.0;
    const auto open = static_cast<std::int64_t>(covered);
    std::fill(b.gate, b.gate + open, 1.0f);
    for (std::int64_t j = open; j < b.count; ++j) b.gate[j] = static_cast<float>(gate_formula(p, rho[u], j));
  }
}

}  // namespace ardlora
