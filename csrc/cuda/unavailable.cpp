#include "ardlora/check.h"
#include "cuda/launch.h"

namespace ardlora::cuda {
namespace {

[[noreturn]] void fail_unavailable(const char* op) {
  fail(ErrorKind::kNotImplemented, op, ": tensors must be on the CPU, this build has no CUDA kernels");
}

}  // namespace

bool built() { return false; }
bool available() { return false; }

void rank_resize(const std::int64_t*, std::int64_t, std::int64_t, Stream) { fail_unavailable("rank_resize"); }
void row_dots(const DeviceRows&, float*, Stream) { fail_unavailable("row_dots"); }
void importance(const DeviceRows&, const ImportanceParams&, Stream) { fail_unavailable("importance"); }
void prox_step(const ProxParams&, Stream) { fail_unavailable("prox_step"); }
void set_gates(const GateBlock*, std::int64_t, const double*, const GateParams&, Stream) {
  fail_unavailable("set_gates");
}

}  // namespace ardlora::cuda
