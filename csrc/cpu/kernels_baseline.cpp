// System headers come before any target pragma: inline library code must stay baseline.
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"
#define KRRST_ISA isa_baseline
#define KRRST_VECTOR_BYTES 16
#define KRRST_REGISTERS 16
#include "kernels.inc"
namespace krrst::cpu {
const Kernels kernels_baseline = isa_baseline::table("baseline");
}
