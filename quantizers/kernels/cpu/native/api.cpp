// The C interface, for ctypes. No exception leaves it: a call that can fail returns 0 or a code, see `library.py`.
#include "api.h"

#include <iterator>
#include <new>

#include "kernels.h"
#include "memory.h"
#include "step.h"

#define PRECIS_API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kAbiVersion = 6;  // changes with every change of a struct or function here
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

// A code of StepError.
template <class Fn>
int stepped(Fn fn) noexcept {
    precis::StepError error = precis::StepError::kNone;
    const int failed = guarded([&] { error = fn(); });
    return failed ? failed : static_cast<int>(error);
}

}  // namespace

PRECIS_API int precis_abi_version() { return kAbiVersion; }
PRECIS_API const char* precis_isa() { return precis::kernels().name; }
PRECIS_API int precis_select_isa(const char* name) { return precis::select_kernels(name) ? 1 : 0; }
PRECIS_API void precis_advise_huge(void* p, int64_t bytes) { precis::advise_huge(p, static_cast<size_t>(bytes)); }
PRECIS_API void precis_collapse_huge(const void* p, int64_t bytes) { precis::collapse_huge(p, static_cast<size_t>(bytes)); }
PRECIS_API int64_t precis_packed_bytes(const precis::Matrix* m) { return precis::matrix_bytes(*m); }

PRECIS_API uint64_t precis_read(const uint64_t* words, int64_t count, int threads) { return precis::read_all(words, count, threads); }

PRECIS_API int precis_pack(const precis::Source* source, const precis::Matrix* m, uint8_t* out, int threads) {
    return guarded([&] { precis::pack(*source, *m, out, threads); });
}

PRECIS_API int precis_linear(const precis::Matrix* m, const float* x, int tokens, float* y, int threads) {
    return guarded([&] { precis::linear(*m, x, tokens, y, threads); });
}

PRECIS_API void* precis_step_new(const precis::Model* model) { return new (std::nothrow) precis::Step(*model); }
PRECIS_API void precis_step_free(void* step) { delete static_cast<precis::Step*>(step); }
PRECIS_API int64_t precis_step_workspace_bytes(const void* step) {
    return static_cast<int64_t>(static_cast<const precis::Step*>(step)->workspace_bytes());
}

PRECIS_API int precis_step_forward(void* step, const precis::Batch* batch, int threads) {
    return stepped([&] { return static_cast<precis::Step*>(step)->forward(*batch, threads); });
}

PRECIS_API int precis_step_decode(void* step, const precis::Batch* batch, precis::Rounds* rounds, int threads) {
    return stepped([&] { return static_cast<precis::Step*>(step)->decode(*batch, *rounds, threads); });
}

// Seconds by Phase since the step was made.
PRECIS_API void precis_step_seconds(const void* step, double* out) {
    const auto& seconds = static_cast<const precis::Step*>(step)->seconds;
    for (size_t i = 0; i < std::size(seconds); i++) out[i] = seconds[i];
}

PRECIS_API int precis_choose(const precis::Draw* draws, int count, int32_t* tokens, int threads) {
    return guarded([&] { precis::choose(draws, count, tokens, threads); });
}

PRECIS_API int precis_log_probabilities(const float* logits, int count, int32_t vocab, const int32_t* tokens, int32_t top, float* logprob,
                                        int32_t* top_id, float* top_logprob, int threads) {
    return guarded([&] { precis::log_probabilities(logits, count, vocab, tokens, top, logprob, top_id, top_logprob, threads); });
}

PRECIS_API void precis_copy_block(const precis::Model* m, uint8_t* cache, int64_t blocks, int64_t from, int64_t to) {
    precis::copy_block({m->layers, blocks, m->kv_heads, m->head_dim, m->cache_kind}, cache, from, to);
}
