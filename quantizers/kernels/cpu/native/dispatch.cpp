// Which table runs: the best that the processor has, found once.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace precis {
namespace {

bool runs(const Kernels* table) {
    if (table == nullptr) return false;
#if defined(__x86_64__)
    if (table == amx_kernels()) return runs(avx512_kernels()) && amx_usable();
    if (table == avx512_kernels())
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    if (table == avx2_kernels()) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#elif defined(__aarch64__) && defined(__linux__)
    if (table == neon_kernels()) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
    return true;
}

// The best first; the last runs everywhere.
std::array<const Kernels*, 5> tables() { return {amx_kernels(), avx512_kernels(), avx2_kernels(), neon_kernels(), &scalar_kernels()}; }

const Kernels* best() {
    const auto all = tables();
    return *std::find_if(all.begin(), all.end(), runs);
}

std::atomic<const Kernels*>& current() {
    static std::atomic<const Kernels*> table{best()};
    return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool select_kernels(const char* name) {
    for (const Kernels* table : tables())
        if (runs(table) && std::strcmp(table->name, name) == 0) {
            current().store(table);
            return true;
        }
    return false;
}

}  // namespace precis
