// Kernels for AVX-512 with VNNI and BF16.
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define PRECIS_ISA "avx512"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")

namespace precis {
namespace {
#include "simd_avx512.h"
#include "kernels.inc"
}  // namespace
}  // namespace precis

#pragma GCC pop_options

namespace precis {
const Kernels* avx512_kernels() { return &kTable; }
}  // namespace precis
#else
namespace precis {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace precis
#endif
