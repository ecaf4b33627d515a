// Threads for the kernels, and the barrier between the phases of one call.
//
// A worker that waits spins for some microseconds, because the next phase or the next call is mostly that near; then it gives its core
// away at every turn, because two spinning threads on a busy machine hold each other up; then it sleeps. Threads are not pinned.
#pragma once

#include <atomic>
#include <cstdint>

namespace precis {

// The threads of one call. Every one of them must reach every barrier.
class Team {
public:
    explicit Team(int size) : size_(size) {}
    int size() const { return size_; }
    void barrier();

    // Units [0, n) of thread `index`: contiguous, the same at every call.
    int64_t begin(int64_t n, int index) const { return n * index / size_; }

private:
    const int size_;
    std::atomic<int> arrived_{0};
    std::atomic<uint32_t> phase_{0};
};

using Job = void (*)(void* context, Team& team, int index);

// Runs `job` on up to `threads` threads, the calling one as index 0, and returns when all have done. While another call has the
// threads, the calling thread does the work alone: results do not depend on the number of threads.
void run_on_threads(int threads, Job job, void* context);

}  // namespace precis
