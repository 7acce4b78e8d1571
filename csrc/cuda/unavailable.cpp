#include "ardlora/check.h"
#include "cuda/launch.h"
#include "cuda/lora_linear.h"

namespace ardlora::cuda {
namespace {

[[noreturn]] void fail_unavailable(const char* op) {
  fail(ErrorKind::kNotImplemented, op, ": tensors must be on the CPU, this build has no CUDA kernels");
}

}  // namespace

bool built() { return false; }
std::string problem(int) { return "be on the CPU, this build has no CUDA kernels"; }

bool overlap_launches(bool) { return false; }

void rank_resize(const std::int64_t*, std::int64_t, std::int64_t, Stream) { fail_unavailable("rank_resize"); }
void row_dots(const DeviceRows&, float*, Stream) { fail_unavailable("row_dots"); }
void importance(const DeviceRows&, const ImportanceParams&, Stream) { fail_unavailable("importance"); }
void set_gates(const GateBlock*, std::int64_t, const double*, const GateParams&, Stream) {
  fail_unavailable("set_gates");
}
Multiprocessors multiprocessors(int) { fail_unavailable("multiprocessors"); }
LoraPlans plan_lora(const UnitTable&, std::int64_t, DType, bool, int) { fail_unavailable("lora_plans"); }
void lora_forward(const LoraParams&, const MatrixView&, const DeviceCall&, const Onto&) {
  fail_unavailable("lora_forward");
}
void lora_backward(const LoraParams&, const MatrixView&, const MatrixView&, const MatrixView&, const MatrixView&,
                   const MatrixView&, float*, const DeviceCall&, const Onto&) {
  fail_unavailable("lora_backward");
}
void lora_grouped_forward(const GroupedParams&, const MatrixView&, const DeviceCall&) {
  fail_unavailable("lora_grouped_forward");
}
void lora_grouped_backward(const GroupedParams&, const MatrixView&, const MatrixView&, const MatrixView&,
                           const MatrixView&, const MatrixView&, float*, const DeviceCall&) {
  fail_unavailable("lora_grouped_backward");
}

}  // namespace ardlora::cuda
