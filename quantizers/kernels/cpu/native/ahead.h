// Keys and values that the next layer's attention will read, asked for among the products before it: those wait for arithmetic, attention of
// several sequences waits for memory.
#pragma once

#include <cstdint>

namespace precis {

struct Ahead {
    static constexpr int64_t kLine = 64, kLines = 3;  // asked for at a time: enough for 16 sequences of a few hundred positions

    const int32_t* block = nullptr;  // of the cache, `count` of them
    int count = 0;
    int64_t block_bytes = 0;         // of one layer
    const uint8_t* layer = nullptr;  // where the layer's blocks begin
    const uint8_t *at = nullptr, *end = nullptr;

    // Goes to the first block of the layer at `blocks`.
    void begin(const uint8_t* blocks) { layer = blocks, next_ = 0, at = end = nullptr; }

    // The next piece of memory to ask for, [from, until); empty at the end.
    void take(const uint8_t*& from, const uint8_t*& until) {
        if (at == end && next_ < count) at = layer + block[next_++] * block_bytes, end = at + block_bytes;
        from = at;
        until = at = end - at > kLines * kLine ? at + kLines * kLine : end;
    }

private:
    int next_ = 0;
};

}  // namespace precis
