#include <type_traits>

#include "cpu/cpu_features.h"
#include "cpu/kernel_table.h"

#define ARDLORA_ISA_NAME "scalar"
#define ARDLORA_ISA_NEEDS 0

namespace ardlora::cpu::scalar {
// Unnamed: a copy merged by the linker would carry these instructions into code that runs everywhere.
namespace {
#include "cpu/vec_scalar.h"

#include "cpu/kernels/all.inl"

}  // namespace
#include "cpu/isa/table.inl"
}  // namespace ardlora::cpu::scalar
