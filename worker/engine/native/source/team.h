// The threads of one engine. The caller is one of them, so that it does not wait beside them.
#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <functional>
#include <thread>
#include <vector>

namespace rts {

// The part of 0 .. count - 1 that is one thread's.
struct Share {
    int first, last;
    Share(int begin, int end) : first(begin), last(end) {}
    Share(int count, int thread, int threads)
        : first(int(int64_t(count) * thread / threads)),
          last(int(int64_t(count) * (thread + 1) / threads)) {}
};

class Team {
 public:
    explicit Team(int size) : size_(size), taken_(size) {
        // Signals are for Python's threads.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { work(i); });
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    ~Team() {
        job_ = nullptr;
        start();
        for (auto& thread : threads_) thread.join();
    }
    Team(const Team&) = delete;

    // Threads that work: all, or the caller alone.
    int size() const { return alone_ ? 1 : size_; }
    void set_alone(bool alone) { alone_ = alone; }

    // Calls job(0) .. job(size - 1), each in its thread, and returns when all have.
    template <class Job>
    void run(Job&& job) {
        if (size() == 1) {
            job(0);
            return barrier();
        }
        std::function<void(int)> function = std::ref(job);
        job_ = &function;
        start();
        job(0);
        barrier();
    }

    // Returns once all threads have called it.
    void barrier() {
        if (size() == 1) return forget_taken();
        uint32_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            forget_taken();
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        // The phases between two barriers take microseconds: to sleep would take longer. But where
        // another process has the core that the last thread needs, it must get to run.
        for (int i = 1; round_.load(std::memory_order_acquire) == round; i++) {
            _mm_pause();
            if (i % SPINS_BEFORE_YIELD == 0) sched_yield();
        }
    }

    // Calls job(i, share) for each i of share_of(0), share_of(1), ..., a share for each thread, in
    // whatever thread gets to it. Every thread calls this, and once between two barriers. It begins
    // with its own share, and then takes of others' what they have not begun: one that another
    // process keeps from its core would else hold up all.
    template <class ShareOf, class Job>
    void spread(int thread, ShareOf share_of, Job job) {
        for (int i = 0; i < size(); i++) {
            const int whose = (thread + i) % size();
            const Share share = share_of(whose);
            auto& count = taken_[whose].count;
            // Looked at before it is written to, or threads that are done would fight for it.
            while (share.first + count.load(std::memory_order_relaxed) < share.last) {
                const int at = share.first + count.fetch_add(1, std::memory_order_relaxed);
                if (at < share.last) job(at, share);
            }
        }
    }

 private:
    // In a cache line of its own.
    struct alignas(64) Taken {
        std::atomic<int> count{0};
    };

    static constexpr int SPINS_BEFORE_YIELD = 2000;
    // About a tenth of a millisecond: the next step mostly begins within it.
    static constexpr int SPINS_BEFORE_SLEEP = 2000;

    void forget_taken() {
        for (auto& taken : taken_)
            if (taken.count.load(std::memory_order_relaxed))
                taken.count.store(0, std::memory_order_relaxed);
    }

    void start() {
        started_.fetch_add(1, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst) > 0)
            syscall(SYS_futex, &started_, FUTEX_WAKE_PRIVATE, size_, nullptr, nullptr, 0);
    }

    void work(int index) {
        pthread_setname_np(pthread_self(), "rts-team");
        uint32_t seen = 0;
        while (true) {
            for (int i = 0; i < SPINS_BEFORE_SLEEP && started_.load() == seen; i++) _mm_pause();
            while (started_.load(std::memory_order_seq_cst) == seen) {
                sleeping_.fetch_add(1, std::memory_order_seq_cst);
                syscall(SYS_futex, &started_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
                sleeping_.fetch_sub(1, std::memory_order_seq_cst);
            }
            seen++;
            if (!job_) return;
            (*job_)(index);
            barrier();
        }
    }

    const int size_;
    bool alone_ = false;
    std::function<void(int)>* job_ = nullptr;
    // Each in a cache line of its own.
    alignas(64) std::atomic<uint32_t> started_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    std::vector<Taken> taken_;  // of each thread's share
    std::vector<std::thread> threads_;
};

}  // namespace rts
