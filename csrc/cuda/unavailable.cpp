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

}  // namespace ardlora::cuda
