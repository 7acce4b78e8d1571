// The limits of this machine under the active instruction set: the yardstick of the micro-benchmarks.
#pragma once

#include <cstdint>

namespace ardlora::bench {

struct Roofline {
  double read_gbs;         // one pass that sums
  double update_gbs;       // one pass that adds in place; bytes read and bytes written both count
  double float32_gflops;   // multiply-adds of floats in registers
  double bfloat16_gflops;  // the same for pairs of bf16, or of floats where the instruction set has no such product
};

// Best of several runs. `bytes` is the working set of all threads together: what fits a cache is measured in it.
Roofline measure_roofline(std::int64_t bytes, int threads);

}  // namespace ardlora::bench
