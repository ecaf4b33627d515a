// One engine step of a Llama-like decoder: a ragged batch of tokens over the paged cache, from token ids to logits.
//
// Model, Batch and Rounds are mirrored by `structs.py`; `step.py` fills them from the model's own tensors and checks what the model is.
#pragma once

#include <vector>

#include "cache.h"
#include "shares.h"
#include "tokens.h"

namespace precis {

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const float* input_norm;  // [hidden]
    const float* post_norm;   // [hidden]
    const float* q_norm;      // [head_dim] or null
    const float* k_norm;
    int64_t window;  // a token attends to that many last positions, its own included; 0: to all
};

struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab;
    int32_t embedding_fp32;  // 0: bf16
    CacheKind cache_kind;
    float epsilon;
    float scaling;            // of the scores
    const void* embedding;    // [vocab][hidden]; null where `table` holds it
    const float* final_norm;  // [hidden]
    Matrix head;
    Matrix table;  // a quantized embedding: symmetric bytes, kGrouped; it may be the head's memory
    const Layer* layer;  // [layers]
};

struct Batch {
    int64_t tokens, sequences, table_width, logit_rows, blocks, positions;
    const int32_t* id;           // [tokens]
    const int32_t* position;     // [tokens], rising by one within a sequence
    const int32_t* query_start;  // [sequences + 1]
    const int32_t* table;        // [sequences][table_width]: cache block of positions 16i..16i+15
    const int32_t* logit_row;    // [logit_rows]: tokens whose logits are wanted
    const float* cos;            // [positions][head_dim / 2]
    const float* sin;
    uint8_t* cache;
    float* logits;    // [logit_rows][vocab]
    int32_t* largest;  // [logit_rows]: where the first largest logit of a row is, -1 where one of them is not finite
};

// Steps in a row over a batch of one token a sequence, each on the tokens that the one before it chose.
struct Rounds {
    int64_t most;                // rounds to go, at least one
    Draw* draw;                  // [most][sequences], without logits; a temperature of 0 takes the largest logit
    const int32_t* end;          // tokens after which a sequence goes no further,
    const int32_t* end_start;    // [sequences + 1]: where each sequence's begin
    double seconds;              // that they may take, as far as the rounds done say how long one takes
    const int32_t* interrupted;  // another thread may set it at any time
    int32_t* token;              // [most][sequences]: what was chosen; -1 as of Kernels::choose, or where a logit is not finite
    int64_t done;  // rounds, each whole: up to the first with an end, with -1, after which there was no time or `interrupted` was set, or all
};

enum class Phase { kNorm, kQkv, kCache, kAttention, kOut, kMlp, kDown, kHead, kWait, kCount };

enum class StepError { kNone = 0, kNoMemory = 1, kToken = 2, kPosition = 3, kStart = 4, kBlock = 5, kLogitRow = 6 };

// What a batch asks for that cannot be done; nothing has been written then.
StepError check(const Model& m, const Batch& b);

// Attention of a few tokens of one sequence, for the query heads from head0 on that share a key/value head, over some chunks.
struct AttentionUnit {
    int token0, tokens, sequence, head0, heads, kv_head;
    int chunk0, chunks;  // of the context, in this unit
};

// How a batch's attention is dealt out. The chunks are the same whatever is chosen here, and so are the results.
struct AttentionPlan {
    std::vector<AttentionUnit> units;
    std::vector<int> sequence_of;  // [tokens]
    bool split = false;         // units are parts of rows: their chunks are joined after all are done
    bool writes_cache = false;  // units write their own keys and values: no token of the batch reads another's
    int chunks = 0;             // the most that any token has

    void make(const Model& m, const Batch& b, int queries, int threads);  // a unit has up to that many rows
};

// First and last chunk (exclusive) of the context that a token at `position` attends to.
inline int first_position(int position, int64_t window) { return window > 0 && position >= window ? static_cast<int>(position - window + 1) : 0; }
inline int chunk_begin(int position, int64_t window) { return first_position(position, window) / kChunk; }
inline int chunk_end(int position) { return position / kChunk + 1; }

class Step {
public:
    explicit Step(const Model& model) : m_(model) {}

    // Throws std::bad_alloc.
    StepError forward(const Batch& batch, int threads);
    // `batch` has one token of every sequence, whose table names the blocks of `most` positions from there on, and wants the logits of all.
    // Throws std::bad_alloc, perhaps after some rounds.
    StepError decode(const Batch& batch, Rounds& rounds, int threads);
    size_t workspace_bytes() const;
    double seconds[static_cast<int>(Phase::kCount)] = {};  // spent by the calling thread since the step was made

private:
    friend class Run;

    // What a thread has of its own. With one token the inputs too: every thread quantizes it, which is quicker than waiting for one.
    struct Local {
        Inputs hidden, out, down, head;
        Buffer<float> normed;   // [kRowsAtOnce][hidden]
        Buffer<float> joined;   // a row of all heads
        Buffer<float> scratch;  // two panels of products, or the query of an attention unit
        Buffer<uint8_t> query, masked;  // of an attention unit: the query; values of a chunk
        Buffer<AttendCall> calls;  // of a unit, one for each chunk
        Buffer<uint8_t> panel;
        Ahead ahead;
        std::vector<int32_t> blocks;  // of `ahead`
        Buffer<Largest> largest;  // [logit_rows], of those that this thread computed
        Buffer<float> max, sum, partial, weight;  // chunks of the unit that is worked on
        size_t bytes() const;
    };

    void reserve(const Batch& b, int threads);

    static constexpr int kRowsAtOnce = 16;   // that are normed and quantized together
    static constexpr int kScratchUnits = 4;  // of one token, whose products stay in `scratch`

    static constexpr int64_t kAheadBytes = 1 << 20;  // of a layer's keys and values: what the second-level cache holds

    const Model m_;
    AttentionPlan plan_;
    std::vector<Local> local_;
    Shares shares_[6];  // by Run::Units
    std::vector<int32_t> id_, position_;  // of a round
    Buffer<float> x_, qkv_, attended_, h_, max_, sum_, partial_;
};

}  // namespace precis
