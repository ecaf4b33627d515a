// The units of one phase, dealt out. Every thread owns a contiguous part and takes from its front, so that it reads memory in order; one
// that is done takes from the back of another's, so that nobody waits long for a thread that was put off or whose memory is slower.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace precis {

class Shares {
public:
    // No part is dealt yet: the phase is empty.
    void reserve(int threads) {
        if (static_cast<int>(parts_.size()) < threads) parts_ = std::vector<Part>(static_cast<size_t>(threads));
    }

    // The units [begin, end) of thread `index`, which calls this; a barrier lies between this and every `take`.
    void deal(int index, int64_t begin, int64_t end) { part(index).store(pack(begin, end), std::memory_order_relaxed); }

    // Up to `most` units for thread `index`: [begin, end). False where none are left.
    bool take(int index, int team, int64_t most, int64_t& begin, int64_t& end) {
        // A quarter of what is left, so that others find something to take when this one is late.
        const auto some = [&](int64_t left) { return std::min(most, std::max<int64_t>(1, left / 4)); };
        const auto front = [&](int64_t first, int64_t last) {
            begin = first, end = first + some(last - first);
            return pack(end, last);
        };
        const auto back = [&](int64_t first, int64_t last) {
            begin = last - some(last - first), end = last;
            return pack(first, begin);
        };
        if (cut(part(index), front)) return true;
        for (int i = 1; i < team; i++)
            if (cut(part((index + i) % team), back)) return true;
        return false;
    }

private:
    struct alignas(64) Part {
        std::atomic<uint64_t> range{0};  // the first unit that is left << 32 | the end
    };

    static uint64_t pack(int64_t begin, int64_t end) { return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end); }
    std::atomic<uint64_t>& part(int index) { return parts_[static_cast<size_t>(index)].range; }

    template <class Rest>
    static bool cut(std::atomic<uint64_t>& range, Rest rest) {
        uint64_t now = range.load(std::memory_order_relaxed);
        for (;;) {
            const auto first = static_cast<int64_t>(now >> 32), last = static_cast<int64_t>(now & 0xffffffffu);
            if (first >= last) return false;
            if (range.compare_exchange_weak(now, rest(first, last), std::memory_order_relaxed)) return true;
        }
    }

    std::vector<Part> parts_;
};

}  // namespace precis
