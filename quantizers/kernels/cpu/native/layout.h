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

inline int64_t block_bytes(const Matrix& m) { return m.columns / m.group * group_bytes(m.group, m.bits, m.zero); }

static_assert(code_bytes(kInputs, 8) == 8 * 64 && code_bytes(kInputs, 4) == 4 * 64, "whole vectors");
static_assert(code_bytes(kInputs, 3) == 3 * 64 && code_bytes(kInputs, 2) == 2 * 64, "whole vectors");
static_assert(group_bytes(32, 4, Zero::kNone) == 288, "4.5 bits a weight");
static_assert(group_bytes(32, 4, Zero::kMinimum) == 320, "5 bits a weight");
static_assert(group_bytes(64, 4, Zero::kInteger) == 560, "4.375 bits a weight");
static_assert(group_bytes(32, 8, Zero::kNone) == 544, "8.5 bits a weight");

}  // namespace precis
