// The paged cache of keys and values: blocks of 16 positions of one sequence.
//
//     cache   | layer 0 | layer 1 | ...        layer | block 0 | block 1 | ...      block | head 0 | head 1 | ...
//     head    | key plane | value plane |      each 16 * head_dim elements
//     bf16    key plane [head_dim / 2][16 positions][2 dimensions]    value plane [8 pairs of positions][head_dim][2 positions]
//     fp32    key plane [head_dim][16 positions]                      value plane [16 positions][head_dim]
//     int8    key plane [head_dim / 4][16 positions][4 dimensions]    value plane [4 quads of positions][head_dim][4 positions]
//             codes of keys are stored 128 too large; each plane ends in the fp32 scales of its 16 positions
//
// so that a vector holds the same part of 16 keys, or 16 dimensions of a value. Slots that were never written may hold anything.
#pragma once

#include <cstring>

#include "kernels.h"

namespace precis {

struct CacheShape {
    int64_t layers, blocks, kv_heads, head_dim;
    CacheKind kind;

    int64_t plane_bytes() const {
        if (kind == CacheKind::kInt8) return kBlockTokens * (head_dim + 4);
        return kBlockTokens * head_dim * (kind == CacheKind::kFp32 ? 4 : 2);
    }
    int64_t block_bytes() const { return 2 * kv_heads * plane_bytes(); }  // of one layer
    uint8_t* keys(uint8_t* cache, int64_t layer, int64_t block, int64_t head) const {
        return cache + (layer * blocks + block) * block_bytes() + head * 2 * plane_bytes();
    }
};

inline void copy_block(const CacheShape& shape, uint8_t* cache, int64_t from, int64_t to) {
    for (int64_t layer = 0; layer < shape.layers; layer++)
        std::memcpy(shape.keys(cache, layer, to, 0), shape.keys(cache, layer, from, 0), static_cast<size_t>(shape.block_bytes()));
}

}  // namespace precis
