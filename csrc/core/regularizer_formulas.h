// The formula of a gate (ardlora/regularizer.h), shared by the CPU and the CUDA kernel.
#pragma once

#include <cmath>
#include <cstdint>

#include "ardlora/regularizer.h"
#include "core/host_device.h"

namespace ardlora {

void check_gates(const GateParams& p);

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
