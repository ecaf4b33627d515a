// The memory of a step: all of it is there before the threads begin, since none of them may fail alone.
#include <algorithm>

#include "step.h"

namespace precis {

void Step::reserve(const Batch& b, int threads) {
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    const int64_t attended = m_.heads * m_.head_dim, widest = std::max({m_.hidden, m_.intermediate, attended}), chunks = plan_.chunks;
    x_.reserve(size(b.tokens * m_.hidden));
    qkv_.reserve(size(b.tokens * (m_.heads + 2 * m_.kv_heads) * m_.head_dim));
    if (!plan_.split) attended_.reserve(size(b.tokens * attended));
    const int64_t parts = plan_.split ? b.tokens * m_.heads * chunks : 0;
    max_.reserve(size(parts + kPastChunks)), sum_.reserve(size(parts + kPastChunks)), partial_.reserve(size(parts * m_.head_dim));
    unsigned hidden = 0, out = 0, down = 0;
    for (int64_t l = 0; l < m_.layers; l++) {
        const Layer& a = m_.layer[l];
        for (const Matrix* m : {&a.q, &a.k, &a.v, &a.gate, &a.up}) hidden |= bit(m->kind);
        out |= bit(a.o.kind), down |= bit(a.down.kind);
    }
    for (Shares& shares : shares_) shares.reserve(threads);
    if (local_.size() < size(threads)) local_ = std::vector<Local>(size(threads));
    for (Local& mine : local_) {
        const bool reads = &mine == &local_[0] || b.tokens == 1;
        if (reads) mine.hidden.prepare(hidden, static_cast<int>(b.tokens), m_.hidden, nullptr);
        if (reads) mine.out.prepare(out, static_cast<int>(b.tokens), attended, nullptr);
        if (reads) mine.down.prepare(down, static_cast<int>(b.tokens), m_.intermediate, nullptr);
        if (&mine == &local_[0] || b.logit_rows == 1) mine.head.prepare(bit(m_.head.kind), static_cast<int>(b.logit_rows), m_.hidden, nullptr);
        if (reads && (b.tokens == 1 || !mine.down.by_groups())) h_.reserve(size(b.tokens * m_.intermediate));
        mine.largest.reserve(size(b.logit_rows));
        mine.blocks.reserve(size(kAheadBytes / (2 * kBlockTokens * m_.kv_heads * m_.head_dim)));  // no kind of cache has smaller blocks
        mine.normed.reserve(size(kRowsAtOnce * m_.hidden)), mine.joined.reserve(size(attended));
        const int64_t products = 2 * std::max<int64_t>(kPanel * b.tokens, kRows * kScratchUnits);
        mine.scratch.reserve(size(std::max(products, kMostQueries * m_.head_dim)));
        mine.query.reserve(size(kMostQueries * query_bytes(m_.cache_kind, m_.head_dim)));
        mine.calls.reserve(size(chunks)), mine.masked.reserve(size(attend_bytes(m_.head_dim)));
        mine.panel.reserve(size(panel_bytes(widest)));
        mine.weight.reserve(size(chunks + kPastChunks));
        if (plan_.split) continue;
        mine.max.reserve(size(kMostQueries * chunks + kPastChunks)), mine.sum.reserve(size(kMostQueries * chunks + kPastChunks)), mine.partial.reserve(size(kMostQueries * chunks * m_.head_dim));
    }
}

size_t Step::Local::bytes() const {
    return hidden.bytes() + out.bytes() + down.bytes() + head.bytes() + normed.bytes() + joined.bytes() + scratch.bytes() + query.bytes() + masked.bytes() + calls.bytes() + panel.bytes() +
           largest.bytes() + max.bytes() + sum.bytes() + partial.bytes() + weight.bytes();
}

size_t Step::workspace_bytes() const {
    size_t total = x_.bytes() + qkv_.bytes() + attended_.bytes() + h_.bytes() + max_.bytes() + sum_.bytes() + partial_.bytes();
    for (const Local& mine : local_) total += mine.bytes();
    return total;
}

}  // namespace precis
