// What a weight matrix looks like in memory. Plain data: every file of this folder agrees on it, and so does `library.py`.
//
// Quantized matrices are cut into blocks of 16 rows; a block is a sequence of groups of inputs, and everything that a group needs
// lies behind its codes, so that one pass reads the memory in order:
//
//     block   | group 0 | group 1 | ...                               rows beyond the last of the matrix are zeros
//     group   | codes, 32 inputs | ... | scale fp16 x16 | zero        zero: nothing, zero points u8 x16, or minimums fp16 x16
//
// 32 inputs of 16 rows are 64-byte vectors in which row r owns bytes 4r..4r+3, as a dot product of bytes wants them. Within a vector,
// byte b (0..3) of a row holds, counted from the first of the 32 inputs:
//
//     8 bits  vector j (0..7): input 4j+b
//     4 bits  vector j (0..3): low nibble input 8j+b, high nibble input 8j+4+b
//     2 bits  vector j (0..1): bits 2f,2f+1 (f 0..3) input 16j+4f+b
//     3 bits  two vectors as of 2 bits hold the low bits; bit i (0..7) of a third one is the high bit of input 4i+b
//
// Codes count from 0: symmetric formats are stored with 2^(bits-1) added. A format without groups is one group of all inputs.
// bf16 and fp32 matrices stay row-major, because their memory is the model's own.
//
// A matrix of a code book has 4-bit codes in the same order, behind a header of 64 bytes, and other tails:
//
//     header  | levels u8 x16 | factor fp32 | zeros            code c of a row stands for (levels[c] - 128) * its scale * factor
//     group   | codes, 32 inputs | ... | scales                kCodebook: fp16 x16; kCodebookPower: exponents e8m0 x16, one group 32 inputs;
//                                                              kCodebookHalves: e4m3 x16 of the first 16 inputs, then of the last 16
//
// A matrix of e4m3 is row-major bytes [rows][columns], then zeros up to a multiple of 64 bytes, then one fp32 scale a row.
#pragma once

#include <cstddef>
#include <cstdint>

namespace precis {

constexpr int kRows = 16;    // rows of a block
constexpr int kInputs = 32;  // inputs that share one activation scale, and the unit of every group
constexpr int kPanel = 32;   // rows that one thread takes at a time when there are several tokens: two blocks

enum class Kind : int32_t {
    kGrouped = 0,  // integer weights; the input is rounded to 8 bits in groups of 32
    kToken = 1,    // 8-bit weights with one scale a row; the input is rounded to 8 bits with one scale a token
    kBf16 = 2,
    kFp32 = 3,
    kGroupedToken = 4,  // integer weights as of kGrouped; the input is rounded to 8 bits with one scale a token
    kCodebook = 5,        // 16 levels, groups with an fp16 scale; the input as of kGrouped, and so for the next two
    kCodebookPower = 6,   // groups of 32 with a power of two
    kCodebookHalves = 7,  // groups of 16 with an e4m3 scale, two side by side
    kE4m3 = 8,            // the input is rounded to e4m3 with one scale a token
};

enum class Zero : int32_t { kNone = 0, kInteger = 1, kMinimum = 2 };

// Mirrored by `library.Matrix`.
struct Matrix {
    Kind kind;
    int32_t bits;
    int32_t group;  // inputs of a group; all of them where the format has no groups
    Zero zero;
    int64_t rows;
    int64_t columns;
    const void* data;
    const float* bias;  // [rows] or null
};
static_assert(sizeof(Matrix) == 48, "library.Matrix is laid out by hand");

constexpr int64_t code_bytes(int inputs, int bits) { return int64_t{kRows} * inputs * bits / 8; }

constexpr int64_t tail_bytes(Zero zero) {
    return 2 * kRows + (zero == Zero::kInteger ? kRows : zero == Zero::kMinimum ? 2 * kRows : 0);
}

constexpr int64_t group_bytes(int group, int bits, Zero zero) { return code_bytes(group, bits) + tail_bytes(zero); }

constexpr int64_t block_count(int64_t rows) { return (rows + kRows - 1) / kRows; }

constexpr bool is_codebook(Kind kind) { return kind == Kind::kCodebook || kind == Kind::kCodebookPower || kind == Kind::kCodebookHalves; }

constexpr int64_t tail_bytes(Kind kind, Zero zero) { return kind == Kind::kCodebookPower ? kRows : tail_bytes(zero); }

constexpr int64_t kHeader = 64;  // of a code book

inline int64_t block_bytes(const Matrix& m) { return m.columns / m.group * (code_bytes(m.group, m.bits) + tail_bytes(m.kind, m.zero)); }

// Where the scales of a matrix of e4m3 begin.
inline int64_t e4m3_scales(const Matrix& m) { return (m.rows * m.columns + 63) / 64 * 64; }

inline int64_t matrix_bytes(const Matrix& m) {
    if (m.kind == Kind::kE4m3) return e4m3_scales(m) + 4 * m.rows;
    return (is_codebook(m.kind) ? kHeader : 0) + block_count(m.rows) * block_bytes(m);
}

static_assert(code_bytes(kInputs, 8) == 8 * 64 && code_bytes(kInputs, 4) == 4 * 64, "whole vectors");
static_assert(code_bytes(kInputs, 3) == 3 * 64 && code_bytes(kInputs, 2) == 2 * 64, "whole vectors");
static_assert(group_bytes(32, 4, Zero::kNone) == 288, "4.5 bits a weight");
static_assert(group_bytes(32, 4, Zero::kMinimum) == 320, "5 bits a weight");
static_assert(group_bytes(64, 4, Zero::kInteger) == 560, "4.375 bits a weight");
static_assert(group_bytes(32, 8, Zero::kNone) == 544, "8.5 bits a weight");
static_assert(code_bytes(64, 4) + tail_bytes(Kind::kCodebook, Zero::kNone) == 544, "4.25 bits a weight");
static_assert(code_bytes(32, 4) + tail_bytes(Kind::kCodebookPower, Zero::kNone) == 272, "4.25 bits a weight");
static_assert(code_bytes(32, 4) + tail_bytes(Kind::kCodebookHalves, Zero::kNone) == 288, "4.5 bits a weight");

}  // namespace precis
