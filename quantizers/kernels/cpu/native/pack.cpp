// From the tensors of `quantizers.weights` to the layout of layout.h.
#include <algorithm>
#include <cstring>

#include "api.h"
#include "memory.h"
#include "numbers.h"
#include "pool.h"

namespace precis {
namespace {

// Code k of a row whose codes are a stream of bits, lowest first.
uint8_t code_at(const uint8_t* row, int64_t k, int bits) {
    const int64_t bit = k * bits;
    uint32_t word = row[bit / 8];
    if (bit % 8 + bits > 8) word |= static_cast<uint32_t>(row[bit / 8 + 1]) << 8;
    return static_cast<uint8_t>(word >> (bit % 8) & ((1u << bits) - 1));
}

// Code of input i (0..31) of row r into the vectors of 32 inputs at `p`.
void put_code(uint8_t* p, int bits, int r, int i, uint8_t code) {
    const int b = r * 4 + i % 4, quad = i / 4;
    if (bits == 8) p[64 * quad + b] = code;
    if (bits == 4) p[64 * (quad / 2) + b] |= static_cast<uint8_t>(code << (quad % 2 * 4));
    if (bits == 2 || bits == 3) p[64 * (quad / 4) + b] |= static_cast<uint8_t>((code & 3) << (quad % 4 * 2));
    if (bits == 3) p[128 + b] |= static_cast<uint8_t>((code >> 2) << quad);
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

void pack_row(const Source& s, const Matrix& m, int64_t row, uint8_t* block) {
    const int64_t groups = m.columns / m.group, codes = code_bytes(m.group, m.bits), whole = codes + tail_bytes(m.kind, m.zero);
    const uint8_t* stream = s.codes + row * s.row_bytes;
    const int r = static_cast<int>(row % kRows);
    for (int64_t g = 0; g < groups; g++) {
        uint8_t* p = block + g * whole;
        for (int i = 0; i < m.group; i++) {
            const uint8_t code = static_cast<uint8_t>(code_at(stream, g * m.group + i, m.bits) ^ s.flip);
            put_code(p + i / kInputs * code_bytes(kInputs, m.bits), m.bits, r, i % kInputs, code);
        }
        put_scale(s, m.kind, row, groups, g, p + codes);
        uint8_t* zero = p + codes + 2 * kRows;
        if (m.zero == Zero::kInteger) zero[r] = s.zero_point[row * groups + g];
        if (m.zero == Zero::kMinimum) std::memcpy(zero + 2 * r, s.minimum + row * groups + g, 2);
    }
}

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
