// Memory that vectors like: 64-byte aligned, and in huge pages where the system gives them.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace precis {

// Asks for huge pages for the whole ones in [p, p + bytes). A hint: where it is refused everything works the same.
inline void advise_huge(void* p, size_t bytes) {
#if defined(__linux__)
    constexpr size_t kHuge = size_t{2} << 20;
    const size_t begin = (reinterpret_cast<size_t>(p) + kHuge - 1) / kHuge * kHuge, end = (reinterpret_cast<size_t>(p) + bytes) / kHuge * kHuge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

// Moves what already lies in [p, p + bytes) into huge pages, the parts at both ends together with their neighbours. A hint too: older
// systems (before Linux 6.1) refuse it, and so do mapped files.
inline void collapse_huge(const void* p, size_t bytes) {
#if defined(__linux__)
    constexpr size_t kHuge = size_t{2} << 20;
    constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
    const size_t begin = reinterpret_cast<size_t>(p) / kHuge * kHuge, end = reinterpret_cast<size_t>(p) + bytes;
    for (size_t page = begin; page < end; page += kHuge) madvise(reinterpret_cast<void*>(page), kHuge, kCollapse);
#else
    (void)p, (void)bytes;
#endif
}

// An array that grows and keeps nothing: what a call writes into it is for that call.
template <class T>
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    // At least `count` elements, whose content is undefined. Throws std::bad_alloc.
    T* reserve(size_t count) {
        if (count <= count_) return data_;
        std::free(data_);
        data_ = nullptr, count_ = 0;
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (data_ == nullptr) throw std::bad_alloc();
        count_ = count;
        return data_;
    }
    T* get() const { return data_; }
    size_t bytes() const { return count_ * sizeof(T); }

private:
    T* data_ = nullptr;
    size_t count_ = 0;
};

}  // namespace precis
