// What is drawn from a row of logits, and the memory that it takes.
#pragma once

#include <cstdint>

#include "memory.h"

namespace precis {

// Mirrored by `structs.Draw`.
struct Draw {
    const float* logits;  // [vocab]; -inf is never drawn
    double u;             // in [0, 1): which of the tokens, as they follow each other with their masses
    int32_t vocab;
    int32_t top_k;      // 0: all
    float temperature;  // above 0
    float top_p;        // 1: all
    float min_p;        // 0: all
};

// What is asked of a row of logits.
struct Score {
    int32_t token, top;
    float* logprob;      // of `token`
    int32_t* top_id;     // [top]: the likeliest, of equal ones the first; no more than the vocabulary has
    float* top_logprob;  // [top]
};

// A token that filters have left so far.
struct Candidate {
    float z;  // (logit - largest) / temperature
    int32_t id;
    double mass;
};

struct DrawMemory {
    static constexpr int kPart = 64;  // logits whose masses are summed in fp32; their sums are added in fp64

    float *z = nullptr, *mass = nullptr, *scratch = nullptr;  // [vocab], and up to 16 more
    float* most = nullptr;                                    // [parts]
    double* sums = nullptr;                                   // [parts]
    Candidate *candidates = nullptr, *order = nullptr;        // [vocab], the first `count` of these
    int32_t count = 0;

    void reserve(int32_t vocab) {
        const size_t size = static_cast<size_t>(vocab) + 16, parts = size / kPart + 1;
        z = z_.reserve(size), mass = mass_.reserve(size), scratch = scratch_.reserve(size), most = most_.reserve(parts), sums = sums_.reserve(parts);
        candidates = candidates_.reserve(size), order = order_.reserve(size);
    }

private:
    Buffer<float> z_, mass_, scratch_, most_;
    Buffer<double> sums_;
    Buffer<Candidate> candidates_, order_;
};

// The token of each draw, see Kernels::choose, with memory of the calling thread's own; one with a temperature of 0 keeps what `tokens` holds.
// Throws std::bad_alloc.
void choose(const Draw* draws, int count, int32_t* tokens, int threads);

}  // namespace precis
