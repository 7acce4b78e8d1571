#include <immintrin.h>

#include <type_traits>

#include "cpu/cpu_features.h"
#include "cpu/kernel_table.h"

#define ARDLORA_ISA_NAME "avx2"
#define ARDLORA_ISA_NEEDS kAvx2Fma

namespace ardlora::cpu::avx2 {
// Unnamed: a copy merged by the linker would carry these instructions into code that runs everywhere.
namespace {
#include "cpu/vec_avx2.h"

#include "cpu/kernels/all.inl"

}  // namespace
#include "cpu/isa/table.inl"
}  // namespace ardlora::cpu::avx2
