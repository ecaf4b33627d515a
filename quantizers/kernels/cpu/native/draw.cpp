// Tokens and probabilities of several rows of logits, by a team.
#include <algorithm>
#include <atomic>
#include <vector>

#include "api.h"
#include "kernels.h"
#include "pool.h"

namespace precis {
namespace {

// One a thread of the team: made beforehand, since none of them may fail alone.
DrawMemory* memories(int threads, int32_t vocab) {
    thread_local std::vector<DrawMemory> all;
    if (all.size() < static_cast<size_t>(threads)) all = std::vector<DrawMemory>(static_cast<size_t>(threads));
    for (int i = 0; i < threads; i++) all[static_cast<size_t>(i)].reserve(vocab);
    return all.data();
}

struct Draws {
    const Draw* draw;
    int32_t* tokens;
    int count;
    DrawMemory* memory;
    std::atomic<int> next{0};
};

void draw(void* context, Team&, int index) {
    auto& d = *static_cast<Draws*>(context);
    for (int i; (i = d.next.fetch_add(1, std::memory_order_relaxed)) < d.count;)
        if (d.draw[i].temperature > 0) d.tokens[i] = kernels().choose(d.draw[i], d.memory[index]);
}

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

}  // namespace

void choose(const Draw* draws, int count, int32_t* tokens, int threads) {
    int32_t vocab = 0;
    int drawn = 0;
    for (int i = 0; i < count; i++)
        if (draws[i].temperature > 0) vocab = std::max(vocab, draws[i].vocab), drawn++;
    if (drawn == 0) return;
    threads = std::min(threads, drawn);
    Draws all{draws, tokens, count, memories(threads, vocab)};
    run_on_threads(threads, draw, &all);
}

void log_probabilities(const float* logits, int count, int32_t vocab, const int32_t* tokens, int32_t top, float* logprob, int32_t* top_id,
                       float* top_logprob, int threads) {
    Rows rows{logits, count, vocab, tokens, top, logprob, top_id, top_logprob, memories(threads, vocab)};
    run_on_threads(threads, run, &rows);
}

}  // namespace precis
