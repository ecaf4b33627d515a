// Tokens and probabilities of rows of logits outside of a step.
#include <vector>

#include "api.h"
#include "kernels.h"
#include "pool.h"

namespace precis {
namespace {

thread_local std::vector<DrawMemory> t_memory;  // one a thread of the team: made beforehand, since none of them may fail alone

struct Rows {
    const float* logits;
    int count;
    int32_t vocab;
    const int32_t* tokens;
    int32_t top;
    float* logprob;
    int32_t* top_id;
    float* top_logprob;
    DrawMemory* memory;
};

void run(void* context, Team& team, int index) {
    const auto& r = *static_cast<Rows*>(context);
    for (int64_t i = team.begin(r.count, index); i < team.begin(r.count, index + 1); i++) {
        const Score score{r.tokens[i], r.top, r.logprob + i, r.top_id + i * r.top, r.top_logprob + i * r.top};
        kernels().log_probabilities(r.logits + i * r.vocab, r.vocab, score, r.memory[index]);
    }
}

DrawMemory* memory(int threads, int32_t vocab) {
    if (t_memory.size() < static_cast<size_t>(threads)) t_memory = std::vector<DrawMemory>(static_cast<size_t>(threads));
    for (int i = 0; i < threads; i++) t_memory[static_cast<size_t>(i)].reserve(vocab);
    return t_memory.data();
}

}  // namespace

void choose(const Draw* draws, int count, int32_t* tokens) {
    for (int i = 0; i < count; i++) tokens[i] = kernels().choose(draws[i], *memory(1, draws[i].vocab));
}

void log_probabilities(const float* logits, int count, int32_t vocab, const int32_t* tokens, int32_t top, float* logprob, int32_t* top_id,
                       float* top_logprob, int threads) {
    Rows rows{logits, count, vocab, tokens, top, logprob, top_id, top_logprob, memory(threads, vocab)};
    run_on_threads(threads, run, &rows);
}

}  // namespace precis
