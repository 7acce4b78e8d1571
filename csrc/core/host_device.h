// Marks formulas that the CPU and the CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define ARDLORA_HOST_DEVICE __host__ __device__
#else
#define ARDLORA_HOST_DEVICE
#endif
