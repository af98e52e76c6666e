// Zeroed memory in huge pages: reading weights through 4 KiB pages costs a fifth of the bandwidth.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <new>
#include <vector>

namespace rts {

constexpr size_t HUGE_PAGE = size_t(2) << 20, LINE = 64;  // bytes; of a page, of a cache line

// Numbers that lie in a Memory, as long as that lives.
template <class T>
class Array {
 public:
    Array() = default;
    Array(T* data, size_t size) : data_(data), size_(size) {}

    T* data() { return data_; }
    const T* data() const { return data_; }
    size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }

 private:
    T* data_ = nullptr;
    size_t size_ = 0;
};

// All memory of an engine. Arrays lie side by side, since most are smaller than a huge page, and
// are given back together. Pages are taken from the system as they are touched.
class Memory {
 public:
    Memory() = default;
    ~Memory() {
        for (const auto& region : regions_) munmap(region.base, region.bytes);
    }
    Memory(const Memory&) = delete;

    // An array of zeros.
    template <class T>
    Array<T> zeros(size_t size) {
        if (size > MOST_BYTES / sizeof(T)) throw std::bad_alloc();
        return Array<T>(static_cast<T*>(take(size * sizeof(T))), size);
    }

 private:
    struct Region {
        void* base;
        size_t bytes;
    };

    static constexpr size_t MOST_BYTES = size_t(1) << 46, REGION = size_t(32) << 20;

    void* take(size_t bytes) {
        bytes = (bytes + LINE - 1) / LINE * LINE;
        if (bytes > left_) open(std::max(bytes, REGION));
        char* at = next_;
        next_ += bytes, left_ -= bytes;
        return at;
    }

    void open(size_t bytes) {
        // A huge page to begin at one, and one behind the end: whole tiles, which may reach beyond
        // an array, must meet memory.
        const size_t mapped = (bytes / HUGE_PAGE + 3) * HUGE_PAGE;
        regions_.reserve(regions_.size() + 1);
        void* p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        regions_.push_back({p, mapped});
        madvise(p, mapped, MADV_HUGEPAGE);
        next_ = reinterpret_cast<char*>((size_t(p) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
        left_ = bytes;
    }

    std::vector<Region> regions_;
    char* next_ = nullptr;
    size_t left_ = 0;
};

inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

}  // namespace rts
