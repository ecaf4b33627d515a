// The inputs of a matrix product in the forms that the kernels read: tiles of quantized tokens, or plain rows.
//
// Tokens are quantized into tiles of at most kTile, so that the products of several tokens with one weight vector need one load each:
// a tile of n tokens that begins at token t0 holds its codes at byte t0 * columns as [columns / 4][n] words of four codes, and its
// scales at t0 * groups as [groups][n]. One token is the tile of one, that is, plain rows.
#pragma once

#include "layout.h"

namespace precis {

constexpr int kTile = 6;  // 6 tokens x 32 rows of sums and of totals fill the 32 vector registers of AVX-512
constexpr int kTileTokens = 16;  // of a tile of AMX

// Sums of products with a group's codes begin at the bits of 1.5 * 2^23, which as a float counts in ones up to 2^22 in both directions: such a sum
// needs no conversion, but as a float is kLift too large.
constexpr float kLift = 12582912.0f;
constexpr int32_t kLiftBits = 0x4b400000;
constexpr int kOffset = 128;  // of bytes of weights that have no zero of their own
static_assert(kInputs * 255 * 128 < 1 << 22, "sums of bytes");

struct QuantizedTokens {
    int8_t* codes = nullptr;
    float* scale = nullptr;        // value = code * scale
    int32_t* start = nullptr;      // where a sum begins that takes back the offset of the weights; one over all inputs is not lifted
    int32_t* half_start[2] = {};   // the same for halves of a group, where a matrix asks for it
    float* negated_sum = nullptr;  // minus the sum of the codes: what a zero point is multiplied with
    float* scaled_sum = nullptr;   // scale * sum of the codes: what a minimum is multiplied with
};

struct Activations {
    int tokens = 0;
    int begin = 0, end = 0;  // the tokens that a product takes, in whole tiles
    int columns = 0;
    bool in_rows = false;  // codes lie in plain rows, scales as [tokens / kTileTokens][groups][kTileTokens]: what AMX wants
    QuantizedTokens grouped;  // groups of 32
    QuantizedTokens token;    // one group a token
    QuantizedTokens token_groups;  // one scale a token, repeated for every 32 inputs, with sums of those
    uint16_t* e4m3 = nullptr;     // [tokens][columns]: numbers of e4m3 as bf16, which holds them all
    float* e4m3_scale = nullptr;  // [tokens]
    uint16_t* bf16 = nullptr;     // [tokens][columns]
    const float* fp32 = nullptr;  // [tokens][columns]
};

constexpr int tile_count(int tokens) { return (tokens + kTile - 1) / kTile; }

// First token of a tile: tiles differ by at most one token in size.
constexpr int tile_start(int tile, int tokens) { return static_cast<int>(int64_t{tile} * tokens / tile_count(tokens)); }

inline int tile_of(int token, int tokens) { return static_cast<int>((int64_t{token + 1} * tile_count(tokens) - 1) / tokens); }

}  // namespace precis
