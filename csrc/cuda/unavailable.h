// The CUDA backend's entry points. This build has none: each call answers with one sentence.
#pragma once

namespace ardlora::cuda {

bool available();
[[noreturn]] void fail_unavailable(const char* op);

}  // namespace ardlora::cuda
