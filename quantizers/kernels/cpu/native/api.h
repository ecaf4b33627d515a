// What the C interface of api.cpp is made of.
#pragma once

#include "draw.h"
#include "layout.h"

namespace precis {

// A quantized weight as `quantizers.weights` holds it. Mirrored by `library.Source`.
struct Source {
    const uint8_t* codes;  // a stream of bits a row
    int64_t row_bytes;
    int64_t flip;  // exclusive-or of every code: 128 makes codes from 0 of two's complement bytes
    const void* scale;  // fp16 [rows][groups]; code books of powers: e8m0 [rows][groups], of halves: e4m3 [rows][2 * groups]
    const uint8_t* zero_point;
    const uint16_t* minimum;
    const uint8_t* header;  // of a code book, kHeader bytes
};

void pack(const Source& source, const Matrix& matrix, uint8_t* out, int threads);

// Row `row` of a packed matrix of symmetric bytes with groups -> x [columns].
void read_row(const Matrix& m, int64_t row, float* x);

// y [tokens][rows] = x [tokens][columns] times the matrix's transpose, plus its bias.
void linear(const Matrix& m, const float* x, int tokens, float* y, int threads);

// Of `count` rows [vocab]: logarithms of the probability of a token each [count], and of the `top` likeliest with their ids [count][top].
void log_probabilities(const float* logits, int count, int32_t vocab, const int32_t* tokens, int32_t top, float* logprob, int32_t* top_id,
                       float* top_logprob, int threads);

// The sum of `count` words, which is not of interest: their reading is.
uint64_t read_all(const uint64_t* words, int64_t count, int threads);

}  // namespace precis
