// The soft orthogonality of the factors of P Lambda Q (AdaLoRA, ElaLoRA): R(M) = ||M M^T - I||_F^2 over the rows of a
// unit, or the norm itself. Its gradient is 4 (M M^T - I) M, or 2 (M M^T - I) M / ||M M^T - I||_F, 0 where that is.
#pragma once

#include <cstdint>
#include <vector>

#include "ardlora/dtype.h"

namespace ardlora {

// The rows of one unit in a factor, and where its gradient is; both contiguous.
struct OrthogonalityBlock {
  const void* rows;  // M [count, width]
  void* grad;        // [count, width], added to
  std::int64_t count;
  std::int64_t width;
  DType dtype;  // of both
};

// grad += strength * dR/dM of every block. `norm`: R is the norm, not its square.
void add_soft_orthogonality(const std::vector<OrthogonalityBlock>& blocks, const double* strength, bool norm,
                            int threads);

}  // namespace ardlora
