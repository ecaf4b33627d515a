#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace precis {
namespace {

constexpr int kSpins = 1000;                                      // about 20 us of pauses
// How long a worker gives way before it sleeps: longer than steps that follow each other directly are apart (80 us), and shorter than a
// server takes between two. A core that then sleeps is where the system puts whoever is sent the step's tokens, instead of the core that
// prepares the next step: the tokens a second that a client sees grow by a tenth.
constexpr auto kAwake = std::chrono::microseconds(100);
constexpr int kMaxWorkers = 255;

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // `yield` does nothing on most processors, and a thousand of nothing is no time
#endif
}

template <class Done>
void spin_until(Done done) {
    for (int i = 0; !done(); i++) {
        if (i < kSpins) pause();
        else sched_yield();
    }
}

// Keep the calling thread, the `index`-th of a team, on a core of its own where the team has all that this process may use. Else it is
// often woken on the core of the thread that wakes it, while whoever is told of the step before still runs on its own, and both halves of
// the next step wait for each other. The first thread stays free to give way.
void keep_apart(int index, int team) {
#if defined(__linux__)
    cpu_set_t allowed, mine;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) != team) return;
    CPU_ZERO(&mine);
    for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed) && seen++ == index) CPU_SET(cpu, &mine);
    sched_setaffinity(0, sizeof mine, &mine);  // where the system refuses, it places threads as it likes
#else
    (void)index, (void)team;
#endif
}

class Pool {
public:
    void run(int threads, Job job, void* context) {
        std::unique_lock<std::mutex> owner(busy_, std::try_to_lock);
        if (threads > 1 && owner.owns_lock()) threads = 1 + grow(threads - 1);
        else threads = 1;
        Team team(threads);
        if (threads == 1) return job(context, team, 0);
        job_ = job, context_ = context, team_ = &team;
        left_.store(workers_, std::memory_order_relaxed);
        {
            // Under the lock, so that a worker that is about to sleep sees the new epoch or is woken.
            std::lock_guard<std::mutex> lock(sleep_);
            epoch_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load(std::memory_order_acquire) > 0) wake_.notify_all();
        job(context, team, 0);
        spin_until([&] { return left_.load(std::memory_order_acquire) == 0; });
    }

private:
    // Workers that exist, at most `wanted`: fewer where the system gives no more threads.
    int grow(int wanted) {
        while (workers_ < wanted && workers_ < kMaxWorkers) {
            sigset_t all, before;
            sigfillset(&all);
            pthread_sigmask(SIG_SETMASK, &all, &before);  // signals belong to the threads of the program
            bool made = true;
            try {
                std::thread(&Pool::work, this, workers_ + 1, wanted + 1, epoch_.load()).detach();
            } catch (const std::system_error&) {
                made = false;
            }
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            if (!made) break;
            workers_++;
        }
        return workers_ < wanted ? workers_ : wanted;
    }

    void work(int index, int team, uint64_t seen) {
        keep_apart(index, team);
        for (;;) {
            wait(seen);
            seen = epoch_.load(std::memory_order_acquire);
            if (index < team_->size()) job_(context_, *team_, index);
            left_.fetch_sub(1, std::memory_order_release);  // also by those who had nothing to do: they have read the call's data
        }
    }

    void wait(uint64_t seen) {
        const auto changed = [&] { return epoch_.load(std::memory_order_acquire) != seen; };
        for (int i = 0; i < kSpins; i++) {
            if (changed()) return;
            pause();
        }
        for (const auto until = std::chrono::steady_clock::now() + kAwake; std::chrono::steady_clock::now() < until; sched_yield())
            if (changed()) return;
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, changed);
        sleeping_.fetch_sub(1);
    }

    std::mutex busy_, sleep_;
    std::condition_variable wake_;
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int> left_{0}, sleeping_{0};
    int workers_ = 0;
    Job job_ = nullptr;
    void* context_ = nullptr;
    Team* team_ = nullptr;
};

Pool* g_pool = nullptr;

// Never destroyed: its threads run until the process ends. A forked child has none of them, so it gets a pool of its own.
Pool& pool() {
    static const bool made = [] {
        g_pool = new Pool;
        return pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; }) == 0;
    }();
    (void)made;
    return *g_pool;
}

}  // namespace

void Team::barrier() {
    if (size_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    spin_until([&] { return phase_.load(std::memory_order_acquire) != phase; });
}

void run_on_threads(int threads, Job job, void* context) { pool().run(threads, job, context); }

}  // namespace precis
