// Directions of new components: rows that join a factor, made orthogonal to all others.
#pragma once

#include <cstdint>
#include <vector>

namespace ardlora {

struct NewRows {
  float* rows;  // [count, width]
  std::int64_t count, width;
  float norm;                       // of the new rows afterwards
  std::vector<std::int64_t> fresh;  // which rows are new
};

// Gram-Schmidt, twice, of each factor's new rows against its other rows and the new ones before them. A row that is a
// sum of those is drawn anew; where there are more rows than columns it stays as it is.
void orthogonal_rows(const std::vector<NewRows>& factors, int threads);

}  // namespace ardlora
