// The memory behind `Activations`, and the products that read it, split over a team.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace precis {

struct QuantizedBuffers {
    Buffer<int8_t> codes;
    Buffer<float> scale, negated_sum, scaled_sum;
    Buffer<int32_t> start, half_start[2];

    QuantizedTokens reserve(int64_t tokens, int64_t columns, int64_t groups, bool halves = false) {
        const size_t scales = static_cast<size_t>((tokens / kTileTokens + 1) * kTileTokens * groups + kTileTokens);  // whole tiles of either form
        const auto half = [&](int i) { return halves ? half_start[i].reserve(scales) : nullptr; };
        return {codes.reserve(static_cast<size_t>(tokens * columns)), scale.reserve(scales), start.reserve(scales), {half(0), half(1)},
                negated_sum.reserve(scales), scaled_sum.reserve(scales)};
    }
    size_t bytes() const { return codes.bytes() + scale.bytes() + negated_sum.bytes() + scaled_sum.bytes() + start.bytes() + half_start[0].bytes() + half_start[1].bytes(); }
};

constexpr unsigned bit(Kind kind) { return 1u << static_cast<int>(kind); }

// The same inputs in every form that the matrices of one phase read.
class Inputs {
public:
    // Room for `tokens` rows in every form of `kinds` (bits `1 << Kind`). fp32 rows are read at `fp32`, or copied where it is null.
    void prepare(unsigned kinds, int tokens, int64_t columns, const float* fp32) {
        kinds_ = kinds;
        view_ = Activations{};
        view_.tokens = view_.end = tokens;
        view_.columns = static_cast<int>(columns);
        view_.fp32 = fp32;
        const size_t size = static_cast<size_t>(tokens * columns);
        if (kinds_ & kReadGroups) view_.grouped = grouped_.reserve(tokens, columns, columns / kInputs, needed(Kind::kCodebookHalves));
        if (needed(Kind::kToken)) view_.token = token_.reserve(tokens, columns, 1);
        if (needed(Kind::kGroupedToken)) view_.token_groups = token_groups_.reserve(tokens, columns, columns / kInputs);
        if (needed(Kind::kE4m3)) view_.e4m3 = e4m3_.reserve(size), view_.e4m3_scale = e4m3_scale_.reserve(static_cast<size_t>(tokens));
        if (needed(Kind::kBf16)) view_.bf16 = bf16_.reserve(size);
        copies_ = needed(Kind::kFp32) && fp32 == nullptr;
        if (copies_) view_.fp32 = fp32_.reserve(size);
    }
    // Columns can be filled in a few at a time, whole groups of 32: no token has one scale for all of them.
    bool by_groups() const { return (kinds_ & ~(kReadGroups | bit(Kind::kBf16) | bit(Kind::kFp32))) == 0; }
    // The columns [column0, column1) of the rows [row0, row1), which are x [row1 - row0][stride]; all columns unless `by_groups`.
    void fill(const Kernels& k, const float* x, int64_t stride, int row0, int row1, int column0, int column1) {
        if (kinds_ & kReadGroups) k.quantize(Kind::kGrouped, x, stride, view_, row0, row1, column0, column1);
        for (Kind kind : {Kind::kToken, Kind::kGroupedToken, Kind::kE4m3, Kind::kBf16})
            if (needed(kind)) k.quantize(kind, x, stride, view_, row0, row1, column0, column1);
        if (!copies_) return;
        for (int row = row0; row < row1; row++, x += stride) std::copy(x, x + column1 - column0, fp32_.get() + int64_t{row} * view_.columns + column0);
    }
    // All columns of rows that follow each other.
    void fill(const Kernels& k, const float* x, int row0, int row1) { fill(k, x, view_.columns, row0, row1, 0, view_.columns); }
    const Activations& view() const { return view_; }
    size_t bytes() const { return grouped_.bytes() + token_.bytes() + token_groups_.bytes() + e4m3_.bytes() + e4m3_scale_.bytes() + bf16_.bytes() + fp32_.bytes(); }

private:
    static constexpr unsigned kReadGroups = bit(Kind::kGrouped) | bit(Kind::kCodebook) | bit(Kind::kCodebookPower) | bit(Kind::kCodebookHalves);

    bool needed(Kind kind) const { return kinds_ & bit(kind); }

    Activations view_;
    unsigned kinds_ = 0;
    bool copies_ = false;
    QuantizedBuffers grouped_, token_, token_groups_;
    Buffer<uint16_t> bf16_, e4m3_;
    Buffer<float> fp32_, e4m3_scale_;
};

// Rows in the units that are dealt out to threads: a block for one token, a panel for more.
inline int64_t unit_rows(int tokens) { return tokens == 1 ? kRows : kPanel; }
inline int64_t unit_count(const Matrix& m, int tokens) { return (m.rows + unit_rows(tokens) - 1) / unit_rows(tokens); }

// Rows of units [unit0, unit1) for the tokens from begin to end: y[token * stride + row - first row], bias included.
inline void multiply(const Kernels& k, const Matrix& m, const Activations& a, int64_t unit0, int64_t unit1, float* y, int64_t stride, uint8_t* panel,
                     Ahead* ahead = nullptr) {
    const int64_t row0 = unit0 * unit_rows(a.tokens), row1 = std::min(m.rows, unit1 * unit_rows(a.tokens));
    if (row0 >= row1) return;
    if (a.tokens == 1) k.matvec(m, a, row0, row1, y);
    else k.matmul(m, a, row0, row1, y, stride, panel, ahead);
    if (m.bias == nullptr) return;
    for (int t = a.begin; t < a.end; t++)
        for (int64_t r = row0; r < row1; r++) y[t * stride + r - row0] += m.bias[r];
}

}  // namespace precis
