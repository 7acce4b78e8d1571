// The CUDA backend's entry points. A build without nvcc answers each launch with one sentence (unavailable.cpp).
// A launch uses the caller's device and stream, allocates nothing and waits for nothing.
#pragma once

#include <cstdint>

namespace ardlora::cuda {

bool built();      // this build has kernels
bool available();  // and a device of this machine can run them

struct Stream {
  int device;
  void* handle;  // cudaStream_t
};

// `table` is a ResizeTable's words in device memory, at an address divisible by 8.
void rank_resize(const std::int64_t* table, std::int64_t jobs, std::int64_t blocks, Stream stream);

}  // namespace ardlora::cuda
