// Allocations: live bytes by device, and their limits.
#pragma once
#include <stdlib.h>
#include <string.h>

#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "faults.h"

namespace standin {

enum Kind { device_memory, pinned_memory };

struct Range { uint64_t begin, end; };  // bytes within an allocation

typedef uint32_t Work;  // number of a piece of work, see ordering.h

// Last writer of some bytes, and their readers since.
struct Segment {
    uint64_t end;
    Work writer;
    std::vector<Work> readers;
};

// Writes to pinned memory, and reads from it, that the host has not waited for yet: see staging.h.
struct Arrival {
    Range range;
    Work work;
    std::vector<uint8_t> data;
    bool visible;
    const uint8_t* source;  // of a late copy that has not read it yet
};
struct Departure { Range range; Work work; uint64_t hash; };

struct Allocation {
    uintptr_t begin;
    uint64_t bytes;
    Kind kind;
    int device, number;
    bool stream_ordered, registered;  // registered memory belongs to the program
    // Bytes that the launch in progress has read [0] and written [1]: one bit each, from the start of the first page.
    std::vector<uint64_t> touched[2];
    uint64_t touched_first = 1, touched_last = 0;  // pages
    std::map<uint64_t, Segment> history;
    std::vector<Arrival> arrivals;
    std::vector<Departure> departures;

    uintptr_t end() const { return begin + bytes; }
    std::string name() const {
        char text[120];
        const char* what = kind == device_memory ? "device" : "pinned";
        snprintf(text, sizeof text, "%s allocation %d (%lu bytes at 0x%lx)", what, number, bytes,
                 begin);
        return text;
    }
};

struct Memory {
    std::map<uintptr_t, std::unique_ptr<Allocation>> live;
    // Freed blocks, kept for a while so that a late access meets a dead block and not a new one.
    std::deque<std::unique_ptr<Allocation>> freed;
    uint64_t freed_bytes = 0, pinned_bytes = 0;
    std::map<int, uint64_t> device_bytes;
    int numbers = 0;
};
static inline Memory& memory() {
    static auto* all = new Memory;
    return *all;
}

static inline Allocation* find(uintptr_t address) {
    auto after = memory().live.upper_bound(address);
    if (after == memory().live.begin()) return nullptr;
    Allocation* before = std::prev(after)->second.get();
    return address < before->end() ? before : nullptr;
}

// Describes, for a message, an address that belongs to no allocation.
static inline std::string whereabouts(uintptr_t address) {
    for (auto& dead : memory().freed)
        if (address >= dead->begin && address < dead->end()) return "inside " + dead->name() + ", which was freed";
    const Allocation* nearest = nullptr;
    uint64_t least = UINT64_MAX;
    for (auto& [begin, it] : memory().live) {
        uint64_t distance = address < begin ? begin - address : address - it->end();
        if (address >= begin && address < it->end()) distance = 0;
        if (distance < least) least = distance, nearest = it.get();
    }
    if (!nearest) return "and nothing is allocated";
    const char* side = address < nearest->begin ? " bytes before " : " bytes past the end of ";
    return std::to_string(least) + side + nearest->name();
}

// Allocates exactly `bytes`, so that AddressSanitizer sees an overrun, and fills them with garbage, so that a test sees
// a missing write.
static inline void* block(uint64_t bytes) {
    void* begin = nullptr;
    if (posix_memalign(&begin, 512, bytes)) return nullptr;
    memset(begin, 0xA7, bytes);
    return begin;
}

static inline void reserve(Kind kind, int device, uint64_t bytes) {
    uint64_t& used = kind == device_memory ? memory().device_bytes[device] : memory().pinned_bytes;
    uint64_t limit = kind == device_memory ? settings().memory : settings().pinned;
    if (bytes > limit || used > limit - bytes) throw Failure{out_of_memory, false, ""};
    used += bytes;
    const char* name = kind == device_memory ? "device_bytes" : "pinned_bytes";
    uint64_t& peak = count((std::string("peak_") + name).c_str());
    uint64_t now = count(name) += bytes;
    if (now > peak) peak = now;
}
static inline void release(Kind kind, int device, uint64_t bytes) {
    (kind == device_memory ? memory().device_bytes[device] : memory().pinned_bytes) -= bytes;
    count(kind == device_memory ? "device_bytes" : "pinned_bytes") -= bytes;
}

static inline Allocation& insert(uintptr_t begin, uint64_t bytes, Kind kind, int device) {
    auto made = std::make_unique<Allocation>();
    made->begin = begin, made->bytes = bytes, made->kind = kind, made->device = device;
    made->number = ++memory().numbers;
    return *(memory().live[begin] = std::move(made));
}
static inline Allocation& allocate(Kind kind, int device, uint64_t bytes, bool stream_ordered) {
    if (bytes == 0) refuse(invalid_value, "an allocation of 0 bytes");
    bool must_fail = kind == device_memory && ++count("allocations") == settings().fail_alloc;
    if (must_fail) throw Failure{out_of_memory, false, ""};
    reserve(kind, device, bytes);
    void* begin = block(bytes);
    if (!begin) {
        release(kind, device, bytes);
        throw Failure{out_of_memory, false, ""};
    }
    Allocation& made = insert((uintptr_t)begin, bytes, kind, device);
    made.stream_ordered = stream_ordered;
    return made;
}

// Returns the allocation that begins at an address, which is about to be freed.
static inline Allocation& owned(uintptr_t address, Kind kind, bool registered = false) {
    auto at = memory().live.find(address);
    bool found = at != memory().live.end() && at->second->kind == kind && at->second->registered == registered;
    if (found) return *at->second;
    refuse(invalid_value, "freeing 0x%lx, which is not a %s allocation: %s", address,
           kind == device_memory ? "device" : registered ? "registered" : "pinned", whereabouts(address).c_str());
}

static inline void deallocate(Allocation& gone) {
    const uint64_t held_back = 64 << 20;
    Memory& all = memory();
    release(gone.kind, gone.device, gone.bytes);
    if (gone.registered) return (void)all.live.erase(gone.begin);
    memset((void*)gone.begin, 0xA7, gone.bytes);
    auto at = all.live.find(gone.begin);
    all.freed_bytes += gone.bytes;
    all.freed.push_back(std::move(at->second));
    all.live.erase(at);
    for (; all.freed_bytes > held_back; all.freed.pop_front()) {
        all.freed_bytes -= all.freed.front()->bytes;
        free((void*)all.freed.front()->begin);
    }
}

// Memory that an operation reads or writes. Pageable host memory belongs to no allocation.
struct Span {
    Allocation* memory;
    uintptr_t address;
    uint64_t bytes;
    uint64_t offset() const { return address - memory->begin; }
    void* data() const { return (void*)address; }
};

static inline Span whole(Allocation& allocation) { return {&allocation, allocation.begin, allocation.bytes}; }

static inline void check_bounds(const char* what, const Span& span) {
    if (span.bytes > span.memory->end() - span.address)
        refuse(invalid_value, "%s: %lu bytes at 0x%lx end %lu bytes past the end of %s", what,
               span.bytes, span.address,
               (span.bytes - (span.memory->end() - span.address)), span.memory->name().c_str());
}
static inline void check_device(const char* what, const Allocation& allocation, int device) {
    if (allocation.kind == device_memory && allocation.device != device)
        refuse(invalid_value, "%s: %s is on device %d, but the context is that of device %d", what,
               allocation.name().c_str(), allocation.device, device);
}
static inline Span device_span(const char* what, int device, uintptr_t address, uint64_t bytes) {
    Span span{find(address), address, bytes};
    if (!span.memory)
        refuse(invalid_value, "%s: 0x%lx is in no live allocation, %s", what, address,
               whereabouts(address).c_str());
    check_bounds(what, span);
    check_device(what, *span.memory, device);
    return span;
}
static inline Span host_span(const char* what, const void* pointer, uint64_t bytes) {
    Span span{find((uintptr_t)pointer), (uintptr_t)pointer, bytes};
    if (!pointer) refuse(invalid_value, "%s: the host pointer is null", what);
    if (!span.memory) return span;
    if (span.memory->kind == device_memory)
        refuse(invalid_value, "%s: the host pointer 0x%lx is in %s", what, span.address,
               span.memory->name().c_str());
    check_bounds(what, span);
    return span;
}

}  // namespace standin
