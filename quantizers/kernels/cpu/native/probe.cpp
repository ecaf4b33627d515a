// A plain read of memory by the threads of the kernels: what a product's bandwidth is measured against.
#include "api.h"
#include "pool.h"

namespace precis {
namespace {

constexpr int64_t kLine = 64 / sizeof(uint64_t), kAhead = 4096 / sizeof(uint64_t);  // as the products do

struct Work {
    const uint64_t* words;
    int64_t count;
    uint64_t* found;  // one a thread
};

void run(void* context, Team& team, int index) {
    const auto& w = *static_cast<const Work*>(context);
    uint64_t sum = 0;  // whole numbers: the compiler may add them in any order, in vectors
    const int64_t end = team.begin(w.count, index + 1);
    int64_t i = team.begin(w.count, index);
    for (; i + kLine <= end; i += kLine) {
        __builtin_prefetch(w.words + i + kAhead);
        for (int64_t j = i; j < i + kLine; j++) sum += w.words[j];
    }
    for (; i < end; i++) sum += w.words[i];
    w.found[index] = sum;
}

}  // namespace

uint64_t read_all(const uint64_t* words, int64_t count, int threads) {
    uint64_t found[256] = {}, sum = 0;
    Work work{words, count, found};
    run_on_threads(threads < 256 ? threads : 256, run, &work);
    for (uint64_t part : found) sum += part;
    return sum;
}

}  // namespace precis
