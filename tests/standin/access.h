// Memory accesses of the launch in progress.
//
// Each access is checked, and marked in a bitmap of its allocation with one bit per byte. A small cache of pages finds
// the bitmap. There is no list of accesses to sort afterwards, however many there are.
#pragma once
#include "memory.h"

namespace standin {

enum Access { reads, writes };

struct Page {
    uintptr_t begin, end;  // part of the page that belongs to the allocation
    uint64_t* touched[2];
};

struct Launch {
    const char* kernel = nullptr;
    int device = 0;
    void (*first_touch)(Allocation&) = nullptr;
    std::vector<Allocation*> touched;
};

const unsigned page_shift = 12, cached_pages = 1024, words_per_page = (1u << page_shift) / 64;
static Page pages[cached_pages];  // used under the driver's lock only
static Launch launch;

static inline Page& cached_page(uintptr_t address) {
    return pages[(uint32_t)(address >> page_shift) * 0x9E3779B1u >> 22];  // hashed, since arenas are equally far apart
}

[[noreturn]] __attribute__((cold, noinline)) static void wild_access(uintptr_t address, unsigned bytes, Access access) {
    const char* does = access == reads ? "reads" : "writes";
    break_device(illegal_address, "kernel %s %s %u bytes at 0x%lx outside of any allocation, %s", launch.kernel, does,
                 bytes, address, whereabouts(address).c_str());
}
[[noreturn]] __attribute__((cold, noinline)) static void misaligned(uintptr_t address, unsigned bytes, Access access) {
    break_device(misaligned_address, "kernel %s %s %u bytes at 0x%lx, which is misaligned", launch.kernel,
                 access == reads ? "reads" : "writes", bytes, address);
}

static void touch_allocation(Allocation& allocation, uint64_t page) {
    if (allocation.touched[reads].empty()) {
        uint64_t count = ((allocation.end() - 1) >> page_shift) - (allocation.begin >> page_shift) + 1;
        for (auto& bits : allocation.touched) bits.assign(count * words_per_page, 0);
    }
    if (allocation.touched_first > allocation.touched_last) {
        launch.first_touch(allocation);
        launch.touched.push_back(&allocation);
        allocation.touched_first = allocation.touched_last = page;
    }
    if (page < allocation.touched_first) allocation.touched_first = page;
    if (page > allocation.touched_last) allocation.touched_last = page;
}

// Looks the allocation up: once per page and launch, unless pages displace each other in the cache.
__attribute__((noinline)) static void load_page(uintptr_t address, unsigned bytes, Access access) {
    Allocation* allocation = find(address);
    if (!allocation || bytes > allocation->end() - address) wild_access(address, bytes, access);
    check_device(launch.kernel, *allocation, launch.device);
    uint64_t page = (address >> page_shift) - (allocation->begin >> page_shift);
    touch_allocation(*allocation, page);
    uintptr_t begin = address >> page_shift << page_shift, end = begin + (1u << page_shift);
    Page& entry = cached_page(address);
    entry.begin = begin > allocation->begin ? begin : allocation->begin;
    entry.end = end < allocation->end() ? end : allocation->end();
    for (int i : {reads, writes}) entry.touched[i] = &allocation->touched[i][page * words_per_page];
}

// Aligned accesses of at most 16 bytes never straddle a word of the bitmap.
static inline void touch(const void* pointer, unsigned bytes, unsigned alignment, Access access) {
    uintptr_t address = (uintptr_t)pointer;
    if (__builtin_expect(address % alignment != 0, 0)) misaligned(address, bytes, access);
    Page& page = cached_page(address);
    if (__builtin_expect(address < page.begin || address + bytes > page.end, 0)) load_page(address, bytes, access);
    page.touched[access][address / 64 % words_per_page] |= ((1ull << bytes) - 1) << address % 64;
}

static inline void begin_touching(const char* kernel, int device, void (*first_touch)(Allocation&)) {
    memset(pages, 0, sizeof pages);
    launch.kernel = kernel, launch.device = device, launch.first_touch = first_touch;
    launch.touched.clear();
}

// Returns the byte ranges that were touched as offsets, in order and merged, and clears them.
static inline std::vector<Range> take_ranges(Allocation& allocation, Access access) {
    std::vector<Range> ranges;
    uint64_t shift = allocation.begin % (1u << page_shift);  // bit 0 is the start of the page
    uint64_t first = allocation.touched_first * words_per_page, last = (allocation.touched_last + 1) * words_per_page;
    for (uint64_t i = first; i < last; i++) {
        uint64_t word = allocation.touched[access][i];
        allocation.touched[access][i] = 0;
        for (uint64_t at = 0; word;) {
            unsigned gap = __builtin_ctzll(word);
            at += gap, word >>= gap;
            unsigned run = ~word ? __builtin_ctzll(~word) : 64;
            uint64_t begin = i * 64 + at - shift;
            if (!ranges.empty() && ranges.back().end == begin) ranges.back().end += run;
            else ranges.push_back({begin, begin + run});
            at += run, word = run < 64 ? word >> run : 0;
        }
    }
    return ranges;
}

}  // namespace standin
