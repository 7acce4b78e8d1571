#include <arm_neon.h>

#include <type_traits>

#include "cpu/cpu_features.h"
#include "cpu/kernel_table.h"

#define ARDLORA_ISA_NAME "neon"
#define ARDLORA_ISA_NEEDS kNeon

namespace ardlora::cpu::neon {
namespace {
#include "cpu/vec_neon.h"

#include "cpu/kernels/all.inl"

}  // namespace
#include "cpu/isa/table.inl"
}  // namespace ardlora::cpu::neon
