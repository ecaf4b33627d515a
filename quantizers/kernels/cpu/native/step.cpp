#include "step.h"

#include "api.h"
#include "numbers.h"

#include <time.h>

#include <algorithm>
#include <cstring>

namespace precis {
namespace {

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

// One forward pass, as every thread of its team runs it.
class Run {
public:
    Run(Step& step, const Batch& batch, const Kernels& kernels)
        : s_(step), m_(step.m_), b_(batch), k_(kernels), tokens_(static_cast<int>(batch.tokens)), single_(batch.tokens == 1),
          columns_((m_.heads + 2 * m_.kv_heads) * m_.head_dim), cache_{m_.layers, batch.blocks, m_.kv_heads, m_.head_dim, m_.cache_kind} {}

    static constexpr int64_t kMostUnits = 64;  // taken at a time
    static constexpr int kTokensOfPart = 64;  // fewer are not worth reading the weights once more

    static void work(void* context, Team& team, int index) { static_cast<Run*>(context)->thread(team, index); }

private:
    using Local = Step::Local;

    void thread(Team& team, int index) {
        if (index == 0) clock_ = now();
        for (int64_t t = first_token(team, index); t < first_token(team, index + 1); t++) embed(static_cast<int>(t));
        find_ahead(team, index);
        deal_qkv(team, index, m_.layer[0]);
        if (single_) wait(team, index);
        for (int64_t l = 0; l < m_.layers; l++) {
            const Layer& layer = m_.layer[l];
            normed(team, index, layer.input_norm);
            qkv(team, index, layer);
            attention(team, index, layer, l);
            if (l + 1 < m_.layers) mine(index).ahead.begin(cache_.keys(b_.cache, l + 1, 0, 0));
            residual(team, index, layer.o, inputs(index).out, Phase::kOut, kOutUnits,
                     [&] { deal(team, index, kMlpUnits, {&layer.gate}, tokens_); });
            normed(team, index, layer.post_norm);
            mlp(team, index, layer);
            residual(team, index, layer.down, inputs(index).down, Phase::kDown, kDownUnits, [&] {
                if (l + 1 < m_.layers) deal_qkv(team, index, m_.layer[l + 1]);
                else deal(team, index, kHeadUnits, {&m_.head}, static_cast<int>(b_.logit_rows));
            });
        }
        if (b_.logit_rows > 0) head(team, index);
    }

    // The inputs that this thread reads: its own copy of one token's, or the team's.
    Local& inputs(int index) { return s_.local_[single_ ? static_cast<size_t>(index) : 0]; }

    void mark(int index, Phase phase) {
        if (index != 0) return;
        const double t = now();
        s_.seconds[static_cast<int>(phase)] += t - clock_;
        clock_ = t;
    }

    void wait(Team& team, int index) {
        team.barrier();
        mark(index, Phase::kWait);
    }

    // The parts of the products that are dealt out to threads. Each is dealt during the phase before it, when no thread takes from it.
    enum Units { kQkvUnits, kAttentionUnits, kOutUnits, kMlpUnits, kDownUnits, kHeadUnits };

    void deal(const Team& team, int index, Units which, std::initializer_list<const Matrix*> parts, int tokens) {
        int64_t count = 0;
        for (const Matrix* m : parts) count += unit_count(*m, tokens);
        if (which != kHeadUnits) count *= token_parts(team);
        s_.shares_[which].deal(index, team.begin(count, index), team.begin(count, index + 1));
    }

    // A long prompt is cut into a part for each thread, which then finds in its own caches what it has written, at the price of reading all
    // weights. Units go through all rows for the first part, then for the second.
    int token_parts(const Team& team) const { return tokens_ >= kTokensOfPart * team.size() ? team.size() : 1; }

    // Where thread `index`'s tokens begin: parts are whole tiles.
    int first_token(const Team& team, int index) const {
        if (token_parts(team) == 1) return static_cast<int>(team.begin(tokens_, index));
        return tile_start(static_cast<int>(team.begin(tile_count(tokens_), index)), tokens_);
    }

    // work(inputs, first unit, end) until none of the `units` of each part are left.
    template <class Work>
    void share(const Team& team, int index, Units which, const Inputs& in, int64_t units, Work work) {
        const bool whole = which == kHeadUnits || token_parts(team) == 1;
        // Products of one token that are added to something or multiplied with something stay in the scratch memory until then.
        const bool direct = which == kQkvUnits || which == kHeadUnits;
        const int64_t most = !whole || (!single_ && which != kHeadUnits) ? 1 : direct ? kMostUnits : Step::kScratchUnits;
        for (int64_t begin, end; s_.shares_[which].take(index, team.size(), most, begin, end);) {
            if (whole) {
                work(in.view(), begin, end);
                continue;
            }
            Activations part = in.view();
            const int of = static_cast<int>(begin / units);
            part.begin = first_token(team, of), part.end = first_token(team, of + 1);
            work(part, begin % units, begin % units + 1);
        }
    }

    // Which keys and values this thread's part of the attention reads, in every layer.
    void find_ahead(const Team& team, int index) {
        Local& local = mine(index);
        local.blocks.clear();
        if (single_ || s_.plan_.split || !s_.plan_.writes_cache) return;
        const auto most = static_cast<size_t>(Step::kAheadBytes / cache_.block_bytes());
        const auto count = static_cast<int64_t>(s_.plan_.units.size());
        int last = -1;
        for (int64_t i = team.begin(count, index); i < team.begin(count, index + 1); i++) {
            const AttentionUnit& u = s_.plan_.units[static_cast<size_t>(i)];
            const int position = b_.position[u.token0], first = first_position(position, m_.layer[0].window) / kBlockTokens;
            for (int b = first; u.sequence != last && b <= position / kBlockTokens && local.blocks.size() < most; b++)
                local.blocks.push_back(b_.table[u.sequence * b_.table_width + b]);
            last = u.sequence;
        }
        local.ahead.block = local.blocks.data(), local.ahead.count = static_cast<int>(local.blocks.size());
        local.ahead.block_bytes = cache_.block_bytes();
        local.ahead.begin(b_.cache);
    }

    Ahead* ahead(int index) { return mine(index).blocks.empty() ? nullptr : &mine(index).ahead; }

    // make(begin, end) for the rows that this thread makes, up to kRowsAtOnce at a time, and a barrier where others read them.
    template <class Make>
    void rows(Team& team, int index, int count, Phase phase, Make make) {
        const bool alone = count == 1;
        const auto begin = [&](int i) { return count == tokens_ ? first_token(team, i) : static_cast<int>(team.begin(count, i)); };
        const int end = alone ? 1 : begin(index + 1);
        for (int r = alone ? 0 : begin(index), next; r < end; r = next) next = std::min(end, (r / Step::kRowsAtOnce + 1) * Step::kRowsAtOnce), make(r, next);
        mark(index, phase);
        if (!alone) wait(team, index);
    }

    void embed(int t) {
        float* x = s_.x_.get() + t * m_.hidden;
        if (m_.embedding == nullptr) return read_row(m_.table, b_.id[t], x);
        if (m_.embedding_fp32) {
            std::memcpy(x, static_cast<const float*>(m_.embedding) + b_.id[t] * m_.hidden, sizeof(float) * static_cast<size_t>(m_.hidden));
            return;
        }
        const uint16_t* row = static_cast<const uint16_t*>(m_.embedding) + b_.id[t] * m_.hidden;
        for (int64_t i = 0; i < m_.hidden; i++) x[i] = from_bf16(row[i]);
    }

    void norm(int t, const float* weight, float* y) {
        k_.rms_norm(s_.x_.get() + t * m_.hidden, weight, m_.epsilon, static_cast<int>(m_.hidden), y);
    }

    void normed(Team& team, int index, const float* weight) {
        rows(team, index, tokens_, Phase::kNorm, [&](int begin, int end) {
            float* y = mine(index).normed.get();
            for (int t = begin; t < end; t++) norm(t, weight, y + (t - begin) * m_.hidden);
            inputs(index).hidden.fill(k_, y, begin, end);
        });
    }

    void deal_qkv(const Team& team, int index, const Layer& layer) { deal(team, index, kQkvUnits, {&layer.q, &layer.k, &layer.v}, tokens_); }

    void qkv(Team& team, int index, const Layer& layer) {
        const int64_t all = unit_count(layer.q, tokens_) + unit_count(layer.k, tokens_) + unit_count(layer.v, tokens_);
        share(team, index, kQkvUnits, inputs(index).hidden, all, [&](const Activations& in, int64_t begin, int64_t end) {
            int64_t before = 0, column = 0;
            for (const Matrix* part : {&layer.q, &layer.k, &layer.v}) {
                const int64_t units = unit_count(*part, tokens_), first = std::clamp<int64_t>(begin - before, 0, units);
                multiply(k_, *part, in, first, std::clamp<int64_t>(end - before, 0, units),
                         s_.qkv_.get() + column + first * unit_rows(tokens_), columns_, mine(index).panel.get(), ahead(index));
                before += units, column += part->rows;
            }
        });
        mark(index, Phase::kQkv);
        deal(team, index, kOutUnits, {&layer.o}, tokens_);
        const auto units = static_cast<int64_t>(s_.plan_.units.size());
        s_.shares_[kAttentionUnits].deal(index, team.begin(units, index), team.begin(units, index + 1));
        wait(team, index);
    }

    void attention(Team& team, int index, const Layer& layer, int64_t l) {
        if (!s_.plan_.writes_cache) {
            for (int64_t t = first_token(team, index); t < first_token(team, index + 1); t++)
                for (int h = 0; h < m_.kv_heads; h++) write_cache(layer, l, static_cast<int>(t), h);
            mark(index, Phase::kCache);
            wait(team, index);
        }
        const auto& units = s_.plan_.units;
        int64_t unit = 0, next = 0, end = 0;
        Shares& shares = s_.shares_[kAttentionUnits];
        for (bool more = shares.take(index, team.size(), 1, unit, end); more; unit = next) {
            more = shares.take(index, team.size(), 1, next, end);
            attend(mine(index), units[static_cast<size_t>(unit)], units[static_cast<size_t>(more ? next : unit)], layer, l);
        }
        mark(index, Phase::kAttention);
        wait(team, index);
        rows(team, index, tokens_, Phase::kAttention, [&](int begin, int end) {
            Inputs& out = inputs(index).out;
            if (!s_.plan_.split) return out.fill(k_, s_.attended_.get() + begin * m_.heads * m_.head_dim, begin, end);
            for (int t = begin; t < end; t++) out.fill(k_, joined(mine(index), layer, t), t, t + 1);
        });
    }

    void write_cache(const Layer& layer, int64_t l, int t, int head) {
        float* key = s_.qkv_.get() + t * columns_ + (m_.heads + head) * m_.head_dim;
        if (layer.k_norm != nullptr) k_.rms_norm(key, layer.k_norm, m_.epsilon, static_cast<int>(m_.head_dim), key);
        turn(key, t, 1.0f, key);
        uint8_t* plane = keys(l, t, head, b_.position[t] / kBlockTokens);
        k_.append(key, key + m_.kv_heads * m_.head_dim, static_cast<int>(m_.head_dim), cache_.kind, b_.position[t] % kBlockTokens, plane,
                  plane + cache_.plane_bytes());
    }

    void turn(const float* x, int t, float factor, float* y) {
        const int64_t half = m_.head_dim / 2, at = b_.position[t] * half;
        k_.turn(x, b_.cos + at, b_.sin + at, static_cast<int>(half), factor, y);
    }

    uint8_t* keys(int64_t l, int t, int head, int block) {
        return cache_.keys(b_.cache, l, b_.table[s_.plan_.sequence_of[static_cast<size_t>(t)] * b_.table_width + block], head);
    }

    // The unit's queries, normed, turned and scaled, [tokens][heads] rows for the cache's kind.
    const void* queries(Local& mine, const AttentionUnit& u, const Layer& layer) {
        const int dims = static_cast<int>(m_.head_dim);
        float* q = mine.scratch.get();
        for (int i = 0; i < u.tokens * u.heads; i++, q += dims) {
            const int t = u.token0 + i / u.heads;
            const float* from = s_.qkv_.get() + t * columns_ + (u.head0 + i % u.heads) * m_.head_dim;
            if (layer.q_norm != nullptr) k_.rms_norm(from, layer.q_norm, m_.epsilon, dims, q), from = q;
            turn(from, t, m_.scaling, q);
            if (m_.cache_kind == CacheKind::kBf16) k_.round_bf16(q, dims, reinterpret_cast<uint16_t*>(mine.query.get()) + i * dims);
            if (m_.cache_kind == CacheKind::kInt8) k_.quantize_query(q, dims, mine.query.get() + i * query_bytes(m_.cache_kind, dims));
        }
        return m_.cache_kind == CacheKind::kFp32 ? static_cast<const void*>(mine.scratch.get()) : mine.query.get();
    }

    // Key planes of the blocks of a chunk for positions from `first` on; blocks that nobody sees are replaced. Returns their number.
    int planes(const AttentionUnit& u, int64_t l, int chunk, int first, int limit, const uint8_t** out) {
        int count = 0;
        for (int b = chunk * kChunkBlocks; b < (chunk + 1) * kChunkBlocks && b * kBlockTokens < limit; b++)
            out[count++] = keys(l, u.token0, u.kv_head, std::max(b, first / kBlockTokens));
        return count;
    }

    // `next` is what this thread attends to after `u`.
    void attend(Local& mine, const AttentionUnit& u, const AttentionUnit& next, const Layer& layer, int64_t l) {
        const int count = u.tokens * u.heads, dims = static_cast<int>(m_.head_dim), last = u.token0 + u.tokens - 1;
        // A query that still stands before its own key is in the last part of the context, whose unit writes the key.
        if (s_.plan_.writes_cache && u.chunk0 + u.chunks == chunk_end(b_.position[last])) write_cache(layer, l, last, u.kv_head);
        int first[kMostQueries], limit[kMostQueries];
        for (int i = 0; i < count; i++) {
            limit[i] = b_.position[u.token0 + i / u.heads] + 1;
            first[i] = first_position(limit[i] - 1, layer.window);
        }
        AttendCall c{};
        c.query = queries(mine, u, layer), c.head_dim = dims, c.kind = cache_.kind, c.memory = mine.masked.get();
        const int64_t chunks = s_.plan_.chunks;
        int calls = 0;
        for (int chunk = u.chunk0; chunk < u.chunk0 + u.chunks; chunk++) {
            // Rows that see nothing of the chunk: those of earlier tokens at its end, of later ones at its beginning.
            int from = 0, to = count;
            while (from < to && limit[from] <= chunk * kChunk) from++;
            while (from < to && first[to - 1] >= (chunk + 1) * kChunk) to--;
            if (from == to) continue;
            c.start = chunk * kChunk, c.rows = to - from, c.first = first + from, c.limit = limit + from;
            c.blocks = planes(u, l, chunk, first[from], limit[to - 1], c.keys);
            for (int b = 0; b < c.blocks; b++) c.values[b] = c.keys[b] + cache_.plane_bytes();
            if (u.tokens == 1) {
                const bool same = chunk + 1 < u.chunk0 + u.chunks;
                const AttentionUnit& then = same ? u : next;
                const int position = b_.position[then.token0], begin = first_position(position, layer.window);
                const int seen = planes(then, l, same ? chunk + 1 : then.chunk0, begin, position + 1, c.next);
                for (int b = seen; b < kChunkBlocks; b++) c.next[b] = c.next[0];
            }
            AttendCall& part = mine.calls.get()[calls++] = c;
            part.query = static_cast<const uint8_t*>(c.query) + from * query_bytes(c.kind, dims);
            const int64_t at = (s_.plan_.split ? (int64_t{u.token0} * m_.heads + u.head0) : 0) * chunks + from * chunks + chunk;
            part.stride = chunks;
            part.max = (s_.plan_.split ? s_.max_ : mine.max).get() + at, part.sum = (s_.plan_.split ? s_.sum_ : mine.sum).get() + at;
            part.out = (s_.plan_.split ? s_.partial_ : mine.partial).get() + at * dims;
        }
        if (calls > 0) k_.attend(mine.calls.get(), calls);
        if (s_.plan_.split) return;
        for (int i = 0; i < count; i++) {
            const int t = u.token0 + i / u.heads;
            join(mine, layer, t, i * chunks, mine.max, mine.sum, mine.partial, s_.attended_.get() + (t * m_.heads + u.head0 + i % u.heads) * dims);
        }
    }

    void join(Local& mine, const Layer& layer, int t, int64_t row, const Buffer<float>& max, const Buffer<float>& sum, const Buffer<float>& out, float* y) {
        const int dims = static_cast<int>(m_.head_dim), begin = chunk_begin(b_.position[t], layer.window), end = chunk_end(b_.position[t]);
        const int64_t at = row + begin;
        k_.combine(max.get() + at, sum.get() + at, out.get() + at * dims, end - begin, dims, mine.weight.get(), y);
    }

    // The attended row of one token whose chunks lie in the step's memory.
    const float* joined(Local& mine, const Layer& layer, int t) {
        for (int h = 0; h < m_.heads; h++)
            join(mine, layer, t, (t * m_.heads + h) * s_.plan_.chunks, s_.max_, s_.sum_, s_.partial_, mine.joined.get() + h * m_.head_dim);
        return mine.joined.get();
    }

    // x += inputs times m. `before_wait` deals the next phase out.
    template <class Deal>
    void residual(Team& team, int index, const Matrix& m, const Inputs& in, Phase phase, Units units, Deal before_wait) {
        float* product = mine(index).scratch.get();
        share(team, index, units, in, unit_count(m, tokens_), [&](const Activations& a, int64_t begin, int64_t end) {
            const int64_t row0 = begin * unit_rows(tokens_), size = (end - begin) * unit_rows(tokens_);
            const int64_t count = std::min(size, m.rows - row0);
            multiply(k_, m, a, begin, end, product, size, mine(index).panel.get(), ahead(index));
            for (int t = a.begin; t < a.end; t++)
                for (int64_t r = 0; r < count; r++) s_.x_.get()[t * m_.hidden + row0 + r] += product[t * size + r];
        });
        mark(index, phase);
        before_wait();
        wait(team, index);
    }

    void mlp(Team& team, int index, const Layer& layer) {
        const int64_t units = unit_count(layer.gate, tokens_);
        Inputs& down = inputs(index).down;
        // Units of several tokens are whole groups: who makes one quantizes it.
        static_assert(kPanel % kInputs == 0, "what is quantized at once");
        const bool at_once = !single_ && down.by_groups();
        share(team, index, kMlpUnits, inputs(index).hidden, units, [&](const Activations& in, int64_t begin, int64_t end) {
            const int64_t row0 = begin * unit_rows(tokens_), size = (end - begin) * unit_rows(tokens_);
            const int64_t count = std::min(size, m_.intermediate - row0);
            float *gate = mine(index).scratch.get(), *up = gate + tokens_ * size;
            multiply(k_, layer.gate, in, begin, end, gate, size, mine(index).panel.get(), ahead(index));
            multiply(k_, layer.up, in, begin, end, up, size, mine(index).panel.get(), ahead(index));
            gate += in.begin * size, up += in.begin * size;
            float* h = at_once ? gate : s_.h_.get() + in.begin * m_.intermediate + row0;
            k_.silu_mul(gate, up, size, in.end - in.begin, static_cast<int>(count), h, at_once ? size : m_.intermediate);
            if (at_once) down.fill(k_, gate, size, in.begin, in.end, static_cast<int>(row0), static_cast<int>(row0 + count));
        });
        mark(index, Phase::kMlp);
        deal(team, index, kDownUnits, {&layer.down}, tokens_);
        wait(team, index);
        if (!at_once) rows(team, index, tokens_, Phase::kNorm, [&](int begin, int end) {
            down.fill(k_, s_.h_.get() + begin * m_.intermediate, begin, end);
        });
    }

    void head(Team& team, int index) {
        const int count = static_cast<int>(b_.logit_rows);
        Inputs& in = s_.local_[count == 1 ? static_cast<size_t>(index) : 0].head;
        rows(team, index, count, Phase::kNorm, [&](int begin, int end) {
            float* y = mine(index).normed.get();
            for (int r = begin; r < end; r++) norm(b_.logit_row[r], m_.final_norm, y + (r - begin) * m_.hidden);
            in.fill(k_, y, begin, end);
        });
        Largest* largest = mine(index).largest.get();
        std::fill(largest, largest + count, Largest{});
        share(team, index, kHeadUnits, in, unit_count(m_.head, count), [&](const Activations& a, int64_t begin, int64_t end) {
            const int64_t row0 = begin * unit_rows(count), row1 = std::min(m_.vocab, end * unit_rows(count));
            float* logits = b_.logits + row0;
            multiply(k_, m_.head, a, begin, end, logits, m_.vocab, mine(index).panel.get(), ahead(index));
            for (int r = 0; r < count; r++, logits += m_.vocab) k_.largest(logits, static_cast<int>(row1 - row0), static_cast<int32_t>(row0), largest[r]);
        });
        mark(index, Phase::kHead);
        wait(team, index);
        if (index != 0) return;
        for (int r = 0; r < count; r++) {
            for (int other = 1; other < team.size(); other++) largest[r].join(s_.local_[static_cast<size_t>(other)].largest.get()[r]);
            b_.largest[r] = largest[r].finite ? largest[r].index : -1;
        }
    }

    Local& mine(int index) { return s_.local_[static_cast<size_t>(index)]; }

    Step& s_;
    const Model& m_;
    const Batch& b_;
    const Kernels& k_;
    const int tokens_;
    const bool single_;
    const int64_t columns_;
    const CacheShape cache_;
    double clock_ = 0;
};

StepError Step::forward(const Batch& batch, int threads) {
    const StepError error = check(m_, batch);
    if (error != StepError::kNone) return error;
    const Kernels& k = kernels();
    plan_.make(m_, batch, k.queries, threads);
    reserve(batch, threads);
    Run run(*this, batch, k);
    run_on_threads(threads, Run::work, &run);
    return StepError::kNone;
}

StepError Step::decode(const Batch& batch, Rounds& rounds, int threads) {
    rounds.done = 0;
    Batch round = batch;
    id_.assign(batch.id, batch.id + batch.tokens), position_.assign(batch.position, batch.position + batch.tokens);
    round.id = id_.data(), round.position = position_.data();
    for (int32_t& position : position_) position += static_cast<int32_t>(rounds.most - 1);
    const StepError wrong = check(m_, round);  // of the last round, before the first writes
    if (wrong != StepError::kNone) return wrong;
    position_.assign(batch.position, batch.position + batch.tokens);
    const double began = now();
    for (bool goes_on = true; goes_on && rounds.done < rounds.most; rounds.done++) {
        const StepError error = forward(round, threads);
        if (error != StepError::kNone) return error;
        Draw* draw = rounds.draw + rounds.done * batch.sequences;
        int32_t* token = rounds.token + rounds.done * batch.sequences;
        for (int64_t s = 0; s < batch.sequences; s++) {
            draw[s].logits = batch.logits + s * m_.vocab, draw[s].vocab = static_cast<int32_t>(m_.vocab);
            token[s] = batch.largest[s];
            if (token[s] < 0) draw[s].temperature = 0;  // not finite, and that is all there is to say of it
        }
        choose(draw, static_cast<int>(batch.sequences), token, threads);
        for (int64_t s = 0; s < batch.sequences; s++) {
            const int32_t *end = rounds.end + rounds.end_start[s], *last = rounds.end + rounds.end_start[s + 1];
            goes_on &= token[s] >= 0 && std::find(end, last, token[s]) == last;
            id_[static_cast<size_t>(s)] = token[s], position_[static_cast<size_t>(s)]++;
        }
        const double each = (now() - began) / static_cast<double>(rounds.done + 1);
        goes_on &= each * static_cast<double>(rounds.done + 2) <= rounds.seconds;
        goes_on &= __atomic_load_n(rounds.interrupted, __ATOMIC_RELAXED) == 0;
    }
    return StepError::kNone;
}

}  // namespace precis
