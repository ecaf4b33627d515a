// From the tensors of `quantizers.weights` to the layout of layout.h.
#include <algorithm>
#include <cstring>

#include "api.h"
#include "memory.h"
#include "numbers.h"
#include "pool.h"

namespace precis {
namespace {

// Codes 4 quad .. 4 quad + 3 of a stream of codes, lowest bits first, a byte each.
template <int kBits>
uint32_t quad_at(const uint8_t* stream, int quad) {
    const int bit = 4 * kBits * quad;
    uint32_t bits = 0, codes = 0;
    std::memcpy(&bits, stream + bit / 8, (bit % 8 + 4 * kBits + 7) / 8);
    for (int b = 0; b < 4; b++) codes |= (bits >> (bit % 8 + b * kBits) & ((1u << kBits) - 1)) << 8 * b;
    return codes;
}

// The next 32 codes of row r, each with the bits of `flip` turned over, into their vectors at `p`.
template <int kBits>
void put_codes(const uint8_t* stream, uint32_t flip, int r, uint8_t* p) {
    uint32_t own[kBits] = {};  // what the row owns of each vector
    for (int quad = 0; quad < kInputs / 4; quad++) {
        const uint32_t codes = quad_at<kBits>(stream, quad) ^ flip * 0x01010101u;
        if constexpr (kBits == 8) own[quad] = codes;
        if constexpr (kBits == 4) own[quad / 2] |= codes << (quad % 2 * 4);
        if constexpr (kBits < 4) own[quad / 4] |= (codes & 0x03030303u) << (quad % 4 * 2);
        if constexpr (kBits == 3) own[2] |= (codes >> 2 & 0x01010101u) << quad;
    }
    for (int j = 0; j < kBits; j++) std::memcpy(p + 64 * j + 4 * r, &own[j], 4);
}

// The scale of group g of a row to its place in the tail at `p`.
void put_scale(const Source& s, Kind kind, int64_t row, int64_t groups, int64_t g, uint8_t* p) {
    const auto* bytes = static_cast<const uint8_t*>(s.scale);
    const int r = static_cast<int>(row % kRows);
    const int64_t at = row * groups + g;
    if (kind == Kind::kCodebookPower) p[r] = bytes[at];
    else if (kind == Kind::kCodebookHalves) p[r] = bytes[2 * at], p[kRows + r] = bytes[2 * at + 1];
    else std::memcpy(p + 2 * r, bytes + 2 * at, 2);
}

template <int kBits>
void pack_row(const Source& s, const Matrix& m, int64_t row, uint8_t* block) {
    const int64_t groups = m.columns / m.group, codes = code_bytes(m.group, kBits), whole = codes + tail_bytes(m.kind, m.zero);
    const uint8_t* stream = s.codes + row * s.row_bytes;
    const int r = static_cast<int>(row % kRows);
    for (int64_t g = 0; g < groups; g++) {
        uint8_t* p = block + g * whole;
        for (int i = 0; i < m.group; i += kInputs, stream += kInputs * kBits / 8) {
            put_codes<kBits>(stream, static_cast<uint32_t>(s.flip), r, p + i / kInputs * code_bytes(kInputs, kBits));
        }
        put_scale(s, m.kind, row, groups, g, p + codes);
        uint8_t* zero = p + codes + 2 * kRows;
        if (m.zero == Zero::kInteger) zero[r] = s.zero_point[row * groups + g];
        if (m.zero == Zero::kMinimum) std::memcpy(zero + 2 * r, s.minimum + row * groups + g, 2);
    }
}

auto row_packer(int bits) { return bits == 8 ? pack_row<8> : bits == 4 ? pack_row<4> : bits == 3 ? pack_row<3> : pack_row<2>; }

}  // namespace

void read_row(const Matrix& m, int64_t row, float* x) {
    const auto* p = static_cast<const uint8_t*>(m.data) + row / kRows * block_bytes(m);
    const int r = static_cast<int>(row % kRows);
    const int64_t codes = code_bytes(m.group, 8);
    for (int64_t done = 0; done < m.columns; done += m.group, p += codes + tail_bytes(m.zero), x += m.group) {
        uint16_t scale;
        std::memcpy(&scale, p + codes + 2 * r, 2);
        const float step = from_half(scale);
        for (int i = 0; i < m.group; i++) x[i] = static_cast<float>(p[64 * (i / 4) + 4 * r + i % 4] - 128) * step;
    }
}

namespace {

struct Work {
    const Source* source;
    const Matrix* matrix;
    uint8_t* out;
};

void run(void* context, Team& team, int index) {
    const auto& w = *static_cast<const Work*>(context);
    const int64_t blocks = block_count(w.matrix->rows), bytes = block_bytes(*w.matrix);
    const auto pack_row = row_packer(w.matrix->bits);
    for (int64_t b = team.begin(blocks, index); b < team.begin(blocks, index + 1); b++) {
        std::memset(w.out + b * bytes, 0, static_cast<size_t>(bytes));
        for (int64_t row = b * kRows; row < std::min(w.matrix->rows, (b + 1) * kRows); row++) pack_row(*w.source, *w.matrix, row, w.out + b * bytes);
    }
}

}  // namespace

void pack(const Source& source, const Matrix& matrix, uint8_t* out, int threads) {
    advise_huge(out, static_cast<size_t>(matrix_bytes(matrix)));
    if (is_codebook(matrix.kind)) std::memcpy(out, source.header, kHeader), out += kHeader;
    Work work{&source, &matrix, out};
    run_on_threads(threads, run, &work);
}

}  // namespace precis
