// What the test programs share: random data, verdicts, and the orders in which blocks and threads run.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "ardlora/dtype.h"
#include "testing/simt.h"

namespace ardlora::testing {

inline std::mt19937 rng(3);

inline float random_float() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(rng); }

template <typename T>
std::vector<T> random_values(std::size_t n) {
  std::vector<T> values(n);
  for (T& v : values) v = from_float<T>(random_float());
  return values;
}

__attribute__((format(printf, 2, 3))) inline void expect(bool right, const char* format, ...) {
  if (right) return;
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::puts(" differs");
  std::exit(1);
}

// Every `case_number` its own order.
inline void set_order(unsigned case_number) {
  constexpr simt::Order kOrders[] = {simt::Order::kForward, simt::Order::kReverse, simt::Order::kSeeded};
  simt::set_order(kOrders[case_number % 3], case_number);
}

// "small": few cases, for builds with a sanitizer.
inline bool small(int argc, char** argv) { return argc > 1 && std::string(argv[1]) == "small"; }

}  // namespace ardlora::testing
