// System headers come before any target pragma: inline library code must stay baseline.
#include <cstdint>
#include <type_traits>

#include "gemm.h"
#define KRRST_ISA isa_baseline
#define KRRST_VECTOR_BYTES 16
#define KRRST_ROWS 4
#include "gemm.inc"
namespace krrst::cpu {
const Kernels kernels_baseline{"baseline", isa_baseline::table<float>(),
                               isa_baseline::table<double>()};
}
