// The formulas of ardlora/regularizer.h for one unit or component, shared by the CPU and the CUDA kernels.
#pragma once

#include <cmath>
#include <cstdint>

#include "ardlora/regularizer.h"
#include "core/host_device.h"

namespace ardlora {

// Checks `p`; its step made smaller by the temporal TV: step / (1 + step * price * tv).
double damped_step(const ProxParams& p);
void check_gates(const GateParams& p);

// `step` is the damped one.
ARDLORA_HOST_DEVICE inline double proximal_value(double alpha, double grad, double weight, double lo, double hi,
                                                 double step, double price) {
  const double moved = alpha - step * grad;
  const double size = fabs(moved) - step * price * weight;
  const double shrunk = copysign(size < 0.0 ? 0.0 : size, moved);
  return shrunk < lo ? lo : (shrunk > hi ? hi : shrunk);
}

ARDLORA_HOST_DEVICE inline double gate_formula(const GateParams& p, double rho, std::int64_t j) {
  const double d = rho - static_cast<double>(j);
  const bool inside = static_cast<double>(j) < floor(rho + 0.5);
  if (p.kind == GateKind::kScale) return inside || j == 0 ? rho / p.width : p.floor;
  if (j == 0 || (p.kind == GateKind::kRamp && d >= 1.0)) return 1.0;
  if (p.kind == GateKind::kHard) return inside ? 1.0 : p.floor;
  if (p.kind == GateKind::kSigmoid) return 1.0 / (1.0 + exp((0.5 - d) / p.width));
  if (d >= 0.0) return d < p.floor ? p.floor : d;
  const double look_ahead = p.floor * (1.0 + d);
  return look_ahead < 0.0 ? 0.0 : look_ahead;
}

}  // namespace ardlora
