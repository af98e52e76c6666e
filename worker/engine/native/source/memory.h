// Zeroed memory in huge pages: reading weights through 4 KiB pages costs a fifth of the bandwidth.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

namespace rts {

constexpr size_t HUGE_PAGE = size_t(2) << 20;

// An array of zeros, taken from the system page by page as it is touched.
template <class T>
class Array {
 public:
    Array() = default;
    explicit Array(size_t size) : size_(size) {
        if (size == 0) return;
        if (size > (size_t(1) << 46) / sizeof(T)) throw std::bad_alloc();
        // Reads a little beyond the end (whole tiles, prefetched lines) must meet memory.
        bytes_ = (size * sizeof(T) / HUGE_PAGE + 2) * HUGE_PAGE;
        void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        base_ = p;
        size_t address = (size_t(p) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        data_ = reinterpret_cast<T*>(address);
        // A small array in a huge page of its own would waste it.
        if (size * sizeof(T) >= HUGE_PAGE) madvise(p, bytes_, MADV_HUGEPAGE);
    }
    Array(Array&& other) noexcept { *this = static_cast<Array&&>(other); }
    Array& operator=(Array&& other) noexcept {
        if (this != &other) {
            release();
            base_ = other.base_, bytes_ = other.bytes_, data_ = other.data_, size_ = other.size_;
            other.base_ = nullptr, other.data_ = nullptr, other.size_ = 0;
        }
        return *this;
    }
    ~Array() { release(); }

    T* data() { return data_; }
    const T* data() const { return data_; }
    size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }

 private:
    void release() {
        if (base_) munmap(base_, bytes_);
    }

    void* base_ = nullptr;
    size_t bytes_ = 0;
    T* data_ = nullptr;
    size_t size_ = 0;
};

inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

}  // namespace rts
