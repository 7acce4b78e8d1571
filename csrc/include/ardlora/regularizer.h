// ARD-LoRA's rank factor alpha: the slope of the loss, the price of a component, the proximal step, the gate it opens.
#pragma once

#include <cstdint>
#include <vector>

namespace ardlora {

// The secant slope of the loss at each unit's soft rank rho: minus the square root of what its boundary component
// j = floor(rho), from 0 to min(live, width) - 1, is worth. The unit's update is worth its Fisher information along
// itself,
//   fisher = ema*fisher + (1 - ema)*(sum of the unit's dots)^2,
// of which j has the share spectrum[j] / sum(spectrum); 0 for a unit without energy.
struct SecantParams {
  std::int64_t units;
  const float* dots;         // <dL/dW_i, W_i> of all components, unit after unit
  const std::int64_t* live;  // [units]
  const double* rho;         // [units]
  const double* spectrum;    // [units, width], squared singular values of each update
  std::int64_t width;
  double ema;
  double* fisher;  // [units], updated in place
};

void secant_slopes(const SecantParams& p, double* slopes);

// Parameters at (soft) ranks, and what the next component of each unit costs: its own, and of the row that the units of
// a module share the part (r_u / max r)^8, relative to those of the others: the units that reach it pay it.
struct CostParams {
  std::int64_t units;
  const double* own;              // [units], parameters of a component
  const std::int64_t* module_of;  // [units]
  const double* ranks;            // [units]
  std::int64_t modules;
  const double* common;  // [modules], parameters of a shared row, 0 without one
};

double unit_costs(const CostParams& p, double* marginal);

// argmin_a  grad*a + price*weight*|a| + price*tv/2*(a - alpha)^2 + (a - alpha)^2 / (2*step),  then clipped to [lo, hi]:
// l1 by soft threshold, the quadratic temporal TV as the smaller step  step / (1 + step*price*tv).
struct ProxParams {
  std::int64_t units;
  double* alpha;         // [units], updated in place
  const double* grad;    // [units]
  const double* weight;  // [units], cost of a component relative to the mean
  const double* lo;      // [units]
  const double* hi;      // [units]
  double step;
  double price;
  double tv;
};

void prox_step(const ProxParams& p);

// Gate of component j of a unit with soft rank rho, d = rho - j. Component 0 is always open.
//   kRamp     1 (d >= 1),  max(d, floor) (0 <= d < 1),  floor*(1 + d) (-1 < d < 0: the look-ahead component),  0 below;
//             continuous in rho, so adding or removing a component whose gate is 0 changes nothing
//   kHard     1 for j < round(rho), floor for the others (straight-through: the slope is the ramp's)
//   kSigmoid  sigma((d - 1/2) / width)
//   kScale    rho / width for j < round(rho) (alpha itself multiplies the update, width = r0), floor for the others
enum class GateKind : int { kRamp = 0, kHard = 1, kSigmoid = 2, kScale = 3 };

struct GateParams {
  GateKind kind;
  double floor;
  double width;
};

double gate_value(const GateParams& p, double rho, std::int64_t j);

struct GateBlock {
  float* gate;         // components of one unit
  std::int64_t count;  // live components
};

void set_gates(const std::vector<GateBlock>& blocks, const double* rho, const GateParams& p);

}  // namespace ardlora
