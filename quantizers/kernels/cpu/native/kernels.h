// The dispatch table: what an instruction set provides. All functions run on the calling thread and write only what they are given.
//
// One source (the .inc files) is compiled once for each instruction set over a vector of 16 floats, so that every set does the same
// floating-point operations in the same order: their results are the same to the bit, and the scalar one is the specification. Two
// exceptions: the bf16 products of AVX2 keep subnormal numbers, below 1.2e-38, which the others take and give as zero; and those of AMX, of
// matrices and of attention, are summed in another order, see amx.inc.
#pragma once

#include <cmath>
#include <cstdint>

#include "activations.h"
#include "ahead.h"
#include "draw.h"

namespace precis {

constexpr int kMostQueries = 16;  // of any instruction set
constexpr int kBlockTokens = 16;  // positions of a cache block: one lane each
constexpr int kChunkBlocks = 4;
constexpr int kChunk = kBlockTokens * kChunkBlocks;  // the split of the context, fixed so that no result depends on threads or batch

enum class CacheKind : int32_t { kBf16 = 0, kFp32 = 1, kInt8 = 2 };

// Bytes of a query row over a cache of a kind: numbers of its type; for bytes what `quantize_query` writes.
constexpr int64_t query_bytes(CacheKind kind, int64_t head_dim) {
    return kind == CacheKind::kFp32 ? 4 * head_dim : kind == CacheKind::kBf16 ? 2 * head_dim : 2 * head_dim + 16;
}

// One chunk of the context for the query rows that share a key/value head.
struct AttendCall {
    const void* query;  // [rows], already scaled, see query_bytes
    int rows;           // 1 to kMostQueries
    int head_dim;       // multiple of 16
    CacheKind kind;
    int blocks;                       // 1 to kChunkBlocks
    const uint8_t* keys[kChunkBlocks];  // the key plane of each block, see cache.h
    const uint8_t* values[kChunkBlocks];
    const uint8_t* next[kChunkBlocks];  // planes of keys that are read after this chunk, to be asked for; null where nothing is asked for
    int start;                        // position of the chunk's first slot
    const int* first;                 // row i attends to the positions first[i] <= p < limit[i], neither less than of the row before it;
                                      // at least one lies in the chunk
    const int* limit;
    int64_t stride;  // results of a row lie that many apart: one for each chunk of the context
    float* max;      // [rows], every `stride`th
    float* sum;      // [rows], every `stride`th
    float* out;      // [rows][head_dim], every `stride`th row; not yet divided by the sum
    uint8_t* memory;  // attend_bytes(head_dim) to work in
};

constexpr int64_t kPastChunks = 15;  // numbers that `combine` reads or writes behind those of the chunks: whole vectors

constexpr int64_t attend_bytes(int64_t head_dim) { return (2 * kChunk + 4 * kMostQueries) * head_dim; }

// Of numbers seen so far.
struct Largest {
    float value = -INFINITY;
    int32_t index = -1;  // of the first that is so large
    bool finite = true;  // all of them

    void join(const Largest& other) {
        finite &= other.finite;
        if (other.value > value || (other.value == value && other.index < index)) value = other.value, index = other.index;
    }
};

struct Kernels {
    const char* name;
    int queries;  // rows of a unit of attention: tokens of one sequence times heads that share a key/value head
    // The columns [column0, column1) of the rows [row0, row1) of `into`, which are x [row1 - row0][stride], in the form that `kind` reads: whole
    // groups of 32, and all columns where a token has one scale. NaN or infinity make the scale of their group NaN.
    void (*quantize)(Kind kind, const float* x, int64_t stride, const Activations& into, int row0, int row1, int column0, int column1);
    // One token: y[row - row0] for rows row0 <= row < row1; row0 is a multiple of 16.
    void (*matvec)(const Matrix& m, const Activations& a, int64_t row0, int64_t row1, float* y);
    // The tokens of `a` from begin to end: y[token * stride + row - row0]; row0 is a multiple of 32. `panel` has panel_bytes(columns);
    // `ahead`, if any, is asked for meanwhile.
    void (*matmul)(const Matrix& m, const Activations& a, int64_t row0, int64_t row1, float* y, int64_t stride, uint8_t* panel, Ahead* ahead);
    void (*round_bf16)(const float* x, int n, uint16_t* y);  // n is a multiple of 16; subnormal results become zero
    void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* y);
    // y [tokens][y_stride] of gate and up [tokens][stride], `n` numbers of each token; those are read to the next multiple of 16.
    void (*silu_mul)(const float* gate, const float* up, int64_t stride, int tokens, int n, float* y, int64_t y_stride);
    // Rotary embedding of one head, times `factor`: the two halves of x [2 * half] are the parts of `half` complex numbers. y may be x.
    void (*turn)(const float* x, const float* cos, const float* sin, int half, float factor, float* y);
    // The key and value [head_dim] of one position into slot 0..15 of a head's planes, see cache.h.
    void (*append)(const float* key, const float* value, int head_dim, CacheKind kind, int slot, uint8_t* keys, uint8_t* values);
    // A query row [head_dim] over a cache of bytes.
    void (*quantize_query)(const float* x, int head_dim, uint8_t* row);
    void (*attend)(const AttendCall* calls, int count);  // the chunks of one unit, all of one kind of cache
    // What `attend` left for the chunks of one row -> result [head_dim]. `max`, `sum` and `weight` have room for kPastChunks more.
    void (*combine)(const float* max, const float* sum, const float* out, int chunks, int head_dim, float* weight, float* result);
    // The numbers `first` to first + n - 1, which are x [n], among those that `seen` knows.
    void (*largest)(const float* x, int n, int32_t first, Largest& seen);
    // The next token, see choose.inc; -1 where a logit is NaN or positive infinity, or all are negative infinity. `memory` has room for its vocabulary.
    int32_t (*choose)(const Draw& draw, DrawMemory& memory);
    void (*log_probabilities)(const float* logits, int32_t vocab, const Score& score, DrawMemory& memory);
};

constexpr int kMostTotals = 8;  // tokens whose totals are kept in memory

// Two blocks unpacked to bytes, with their scales and zeros as floats, and the totals of some tokens. In whole
// pages: panels of two threads may lie side by side, and what a processor asks for by itself goes on to the end of a page.
constexpr int64_t panel_bytes(int64_t columns) {
    return (kPanel * columns + (2 * kPanel * columns / kInputs + kMostTotals * kPanel) * 4 + 4095) / 4096 * 4096;
}

const Kernels& scalar_kernels();
const Kernels* avx2_kernels();  // null where it was not compiled, and so are the next three
const Kernels* avx512_kernels();
const Kernels* amx_kernels();
const Kernels* neon_kernels();
bool amx_usable();  // the processor has tiles of bytes, and this process the system's leave to use them

const Kernels& kernels();                 // the best that this processor runs, or the one selected
bool select_kernels(const char* name);    // false where it cannot run here

}  // namespace precis
