#include <immintrin.h>

#include <type_traits>

#include "cpu/cpu_features.h"
#include "cpu/kernel_table.h"

#define ARDLORA_ISA_NAME "avx512"
#define ARDLORA_ISA_NEEDS kAvx512

namespace ardlora::cpu::avx512 {
// Unnamed: a copy merged by the linker would carry these instructions into code that runs everywhere.
namespace {
#include "cpu/vec_avx512.h"

#include "cpu/kernels/all.inl"

}  // namespace
#include "cpu/isa/table.inl"
}  // namespace ardlora::cpu::avx512
