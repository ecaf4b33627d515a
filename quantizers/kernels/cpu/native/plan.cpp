// What a batch may ask for, and how its attention is dealt out to threads.
#include <algorithm>

#include "step.h"

namespace precis {

StepError check(const Model& m, const Batch& b) {
    const auto outside = [](int64_t value, int64_t end) { return value < 0 || value >= end; };
    if (b.sequences < 1 || b.query_start[0] != 0 || b.query_start[b.sequences] != b.tokens) return StepError::kStart;
    for (int64_t s = 0; s < b.sequences; s++)
        if (b.query_start[s] >= b.query_start[s + 1] || b.query_start[s + 1] > b.tokens) return StepError::kStart;
    for (int64_t s = 0; s < b.sequences; s++) {
        const int32_t begin = b.query_start[s], end = b.query_start[s + 1];
        for (int32_t t = begin; t < end; t++) {
            if (outside(b.id[t], m.vocab)) return StepError::kToken;
            if (outside(b.position[t], b.positions) || (t > begin && b.position[t] != b.position[t - 1] + 1)) return StepError::kPosition;
        }
        const int64_t last = b.position[end - 1] / kBlockTokens;
        if (last >= b.table_width) return StepError::kBlock;
        // Blocks that only a window has left behind may be gone already.
        int64_t first = last;
        for (int64_t l = 0; l < m.layers; l++) first = std::min<int64_t>(first, first_position(b.position[begin], m.layer[l].window) / kBlockTokens);
        for (int64_t i = first; i <= last; i++)
            if (outside(b.table[s * b.table_width + i], b.blocks)) return StepError::kBlock;
    }
    for (int64_t r = 0; r < b.logit_rows; r++)
        if (outside(b.logit_row[r], b.tokens)) return StepError::kLogitRow;
    return StepError::kNone;
}

void AttentionPlan::make(const Model& m, const Batch& b, int queries, int threads) {
    const int group = static_cast<int>(m.heads / m.kv_heads), heads = std::min(group, queries), tile = std::max(1, queries / heads);
    units.clear();
    sequence_of.resize(static_cast<size_t>(b.tokens));
    chunks = 0;
    for (int s = 0; s < b.sequences; s++)
        for (int t = b.query_start[s]; t < b.query_start[s + 1]; t++) {
            sequence_of[static_cast<size_t>(t)] = s;
            chunks = std::max(chunks, chunk_end(b.position[t]));
        }
    // A unit a token and key/value head is enough work for all threads, or else the context is split too.
    split = threads > 1 && b.tokens * m.kv_heads < 4 * threads;
    writes_cache = b.tokens == b.sequences && group <= queries;
    const int part = split ? std::max<int>(1, static_cast<int>(b.tokens * m.kv_heads * chunks / (8 * threads))) : chunks;
    for (int s = 0; s < b.sequences; s++)
        for (int t = b.query_start[s]; t < b.query_start[s + 1]; t += split ? 1 : tile) {
            const int tokens = split ? 1 : std::min(tile, b.query_start[s + 1] - t), end = chunk_end(b.position[t + tokens - 1]);
            for (int head = 0; head < m.heads; head += std::min(heads, group - head % group)) {
                const int count = std::min(heads, group - head % group);
                for (int c = 0; c < end; c += part) units.push_back({t, tokens, s, head, count, head / group, c, std::min(part, end - c)});
            }
        }
}

}  // namespace precis
