// Kernels for NEON with the dot products of ARMv8.2.
#include "isa.h"

#if defined(__aarch64__) && defined(__linux__)
#include <arm_neon.h>
#define PRECIS_ISA "neon"
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
// Scheduling before registers are given out loads all operands of an unrolled loop first, and then spills them.
#pragma GCC optimize("no-schedule-insns")

namespace precis {
namespace {
#include "simd_neon.h"
#include "kernels.inc"
}  // namespace
}  // namespace precis

#pragma GCC pop_options

namespace precis {
const Kernels* neon_kernels() { return &kTable; }
}  // namespace precis
#else
namespace precis {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace precis
#endif
