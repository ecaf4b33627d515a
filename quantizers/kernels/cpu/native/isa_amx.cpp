// AVX-512's kernels, with products by AMX.
#include "isa.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c,amx-tile,amx-int8")

namespace precis {
namespace {
#include "simd_avx512.h"
#include "coming.inc"
#include "packed.inc"
#include "soften.inc"
#include "amx.inc"
#include "amx_attention.inc"
}  // namespace
}  // namespace precis

#pragma GCC pop_options

namespace precis {

const Kernels* amx_kernels() {
    static const Kernels table = [] {
        Kernels t = *avx512_kernels();
        t.name = "amx", t.quantize = amx_quantize, t.matvec = amx_matvec, t.matmul = amx_matmul;
        t.queries = 16, t.attend = amx_attend;
        return t;
    }();
    return &table;
}

bool amx_usable() {
    constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // of leaf 7's edx: products of bf16, tiles, products of bytes
    constexpr long kRequest = 0x1023, kTileData = 18;         // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: the kernel's leave to use tiles
    unsigned a, b, c, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace precis
#else
namespace precis {
const Kernels* amx_kernels() { return nullptr; }
bool amx_usable() { return false; }
}  // namespace precis
#endif
