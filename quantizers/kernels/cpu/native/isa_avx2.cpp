// Kernels for AVX2 with FMA and F16C.
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define PRECIS_ISA "avx2"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace precis {
namespace {
#include "simd_avx2.h"
#include "kernels.inc"
}  // namespace
}  // namespace precis

#pragma GCC pop_options

namespace precis {
const Kernels* avx2_kernels() { return &kTable; }
}  // namespace precis
#else
namespace precis {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace precis
#endif
