// Directions of new components: rows that join a factor, made orthogonal to all others.
#pragma once

#include <cstdint>
#include <vector>

namespace ardlora {

struct NewRows {
  const float* others;  // [others_rows, width]
  std::int64_t others_rows;
  std::vector<std::int64_t> kept;  // which of them stay
  float* rows;                     // [count, width], the new ones
  std::int64_t count, width;
  float norm;  // of the new rows afterwards
};

// Gram-Schmidt of each factor's new rows against the rows it keeps and the new ones before them, twice where the first
// time leaves little. A row that is a sum of those is drawn anew; where there are more rows than columns it stays as
// it is.
void orthogonal_rows(const std::vector<NewRows>& factors, int threads);

// `count` numbers between -1 and 1, a function of the seed and their place alone.
void draw_uniform(float* out, std::int64_t count, std::uint64_t seed, int threads);

}  // namespace ardlora
