// The C interface, for ctypes. No exception leaves it: a call that can fail returns 0 or a code, see `library.py`.
#include "api.h"

#include <new>

#include "kernels.h"
#include "memory.h"

#define PRECIS_API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kAbiVersion = 1;  // changes with every change of a struct or function here
enum Result { kOk = 0, kNoMemory = 1 };

template <class Fn>
int guarded(Fn fn) noexcept {
    try {
        fn();
        return kOk;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

}  // namespace

PRECIS_API int precis_abi_version() { return kAbiVersion; }
PRECIS_API const char* precis_isa() { return precis::kernels().name; }
PRECIS_API int precis_select_isa(const char* name) { return precis::select_kernels(name) ? 1 : 0; }
PRECIS_API void precis_advise_huge(void* p, int64_t bytes) { precis::advise_huge(p, static_cast<size_t>(bytes)); }
PRECIS_API int64_t precis_packed_bytes(const precis::Matrix* m) { return precis::block_count(m->rows) * precis::block_bytes(*m); }

PRECIS_API int precis_pack(const precis::Source* source, const precis::Matrix* m, uint8_t* out, int threads) {
    return guarded([&] { precis::pack(*source, *m, out, threads); });
}

PRECIS_API int precis_linear(const precis::Matrix* m, const float* x, int tokens, float* y, int threads) {
    return guarded([&] { precis::linear(*m, x, tokens, y, threads); });
}
