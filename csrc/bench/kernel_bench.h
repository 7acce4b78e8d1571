// Times one operation of the core on data of its own, in C++: no Python, no allocation in the timed part.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ardlora/dtype.h"
#include "ardlora/unit_table.h"

namespace ardlora::bench {

struct KernelCase {
  std::string op;  // shrink, expand, outer (of one factor), forward, backward (of the layer's adapter)
  bool is_a;       // which factor a primitive works on
  std::int64_t rows;
  DType activation;
  DType adapter;
  double dropout;  // forward and backward
  int threads;
  int repeats;
  bool cold;  // sweep the caches before each run
};

struct KernelTimes {
  std::vector<double> seconds;  // [repeats]
  double flops;                 // multiply-adds count as two
  double read_bytes;            // what must be read once, without what is updated in place
  double update_bytes;          // what is read and written: both count
};

KernelTimes time_kernel(const UnitTable& table, const KernelCase& c);

}  // namespace ardlora::bench
