// Launchers of what the rank controllers need: importance and ARD-LoRA's steps.
#include "cuda/importance.cuh"
#include "cuda/launch.h"
#include "cuda/launcher.h"
#include "cuda/regularizer.cuh"

namespace ardlora::cuda {
namespace {

Grid row_grid(const DeviceRows& t, bool follows = false) {
  return {dim3{static_cast<unsigned>((t.rows + kRowsPerBlock - 1) / kRowsPerBlock)}, kRowThreads, 0, follows};
}

void check_rows(const char* op, const DeviceRows& t) {
  ARDLORA_CHECK(t.table != nullptr || t.rows == 0, op, ": table must not be null");
  ARDLORA_CHECK(t.rows >= 0 && t.rows < (std::int64_t{1} << 31), op, ": rows must be 0 to 2^31 - 1, got ", t.rows);
}

}  // namespace

void row_dots(const DeviceRows& rows, float* out, Stream stream) {
  constexpr const char* op = "row_dots";
  check_rows(op, rows);
  const DeviceGuard guard(op, stream.device);
  launch(op, row_sums_kernel<false>, row_grid(rows), stream.handle, rows.table, rows.jobs, rows.rows, out);
}

void importance(const DeviceRows& rows, const ImportanceParams& p, Stream stream) {
  constexpr const char* op = "importance";
  check_rows(op, rows);
  ARDLORA_CHECK(p.beta1 >= 0.0 && p.beta1 < 1.0, op, ": beta1 must be in [0, 1), got ", p.beta1);
  ARDLORA_CHECK(p.beta2 >= 0.0 && p.beta2 < 1.0, op, ": beta2 must be in [0, 1), got ", p.beta2);
  const DeviceGuard guard(op, stream.device);
  // Sums of |w g| first: one entry that is not finite spoils its sum, and then nothing may change.
  float* finite = p.workspace + rows.rows;
  launch(op, row_sums_kernel<true>, row_grid(rows), stream.handle, rows.table, rows.jobs, rows.rows, p.workspace);
  launch(op, all_finite_kernel, {dim3{1}, kFiniteThreads, kFiniteShared, rows.rows > 0}, stream.handle, p.workspace,
         rows.rows, finite);
  const ImportanceStep step{static_cast<float>(p.beta1),
                            static_cast<float>(1.0 - p.beta1),
                            static_cast<float>(p.beta2),
                            static_cast<float>(1.0 - p.beta2),
                            finite,
                            p.score};
  launch(op, importance_kernel, row_grid(rows, true), stream.handle, rows.table, rows.jobs, rows.rows, step);
}

void set_gates(const GateBlock* blocks, std::int64_t units, const double* rho, const GateParams& p, Stream stream) {
  constexpr const char* op = "set_gates";
  check_gates(p);
  const DeviceGuard guard(op, stream.device);
  launch(op, gates_kernel, {dim3{static_cast<unsigned>(units)}, kUnitThreads}, stream.handle, blocks, rho, p);
}

}  // namespace ardlora::cuda
