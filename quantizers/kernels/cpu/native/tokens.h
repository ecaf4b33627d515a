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
    Buffer<float> scale, scaled_sum;
    Buffer<int32_t> negated_sum;

    QuantizedTokens reserve(int64_t tokens, int64_t columns, int64_t groups) {
        const size_t scales = static_cast<size_t>(tokens * groups);
        return {codes.reserve(static_cast<size_t>(tokens * columns)), scale.reserve(scales), negated_sum.reserve(scales), scaled_sum.reserve(scales)};
    }
    size_t bytes() const { return codes.bytes() + scale.bytes() + scaled_sum.bytes() + negated_sum.bytes(); }
};

// The same inputs in every form that the matrices of one phase read.
class Inputs {
public:
    // Room for `tokens` rows in the forms of `matrices`, which all have as many columns.
    void prepare(std::initializer_list<const Matrix*> matrices, int tokens, const float* fp32) {
        view_ = Activations{};
        view_.tokens = tokens;
        view_.columns = static_cast<int>((*matrices.begin())->columns);
        view_.fp32 = fp32;
        for (bool& needed : needed_) needed = false;
        for (const Matrix* m : matrices) needed_[static_cast<int>(m->kind)] = true;
        if (needed(Kind::kGrouped)) view_.grouped = grouped_.reserve(tokens, view_.columns, view_.columns / kInputs);
        if (needed(Kind::kToken)) view_.token = token_.reserve(tokens, view_.columns, 1);
        if (needed(Kind::kBf16)) view_.bf16 = bf16_.reserve(static_cast<size_t>(tokens) * static_cast<size_t>(view_.columns));
    }
    void fill(const Kernels& k, const float* x, int row) {
        for (Kind kind : {Kind::kGrouped, Kind::kToken, Kind::kBf16})
            if (needed(kind)) k.quantize_row(kind, x, view_, row);
    }
    const Activations& view() const { return view_; }
    size_t bytes() const { return grouped_.bytes() + token_.bytes() + bf16_.bytes(); }

private:
    bool needed(Kind kind) const { return needed_[static_cast<int>(kind)]; }

    Activations view_;
    bool needed_[4] = {};
    QuantizedBuffers grouped_, token_;
    Buffer<uint16_t> bf16_;
};

// Rows in the units that are dealt out to threads: a block for one token, a panel for more.
inline int64_t unit_rows(int tokens) { return tokens == 1 ? kRows : kPanel; }
inline int64_t unit_count(const Matrix& m, int tokens) { return (m.rows + unit_rows(tokens) - 1) / unit_rows(tokens); }

// Rows of units [unit0, unit1) for all tokens: y[token * stride + row - first row], bias included.
inline void multiply(const Kernels& k, const Matrix& m, const Activations& a, int64_t unit0, int64_t unit1, float* y, int64_t stride, uint8_t* panel) {
    const int64_t row0 = unit0 * unit_rows(a.tokens), row1 = std::min(m.rows, unit1 * unit_rows(a.tokens));
    if (row0 >= row1) return;
    if (a.tokens == 1) k.matvec(m, a, row0, row1, y);
    else k.matmul(m, a, row0, row1, y, stride, panel);
    if (m.bias == nullptr) return;
    for (int t = 0; t < a.tokens; t++)
        for (int64_t r = row0; r < row1; r++) y[t * stride + r - row0] += m.bias[r];
}

}  // namespace precis
