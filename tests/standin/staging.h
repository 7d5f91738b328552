// Host's view of pinned memory. Work runs at once, but the host learns of it only when it waits. Until then, bytes
// that a device wrote are kept aside and the host finds poison, and bytes that a device reads must not change.
#pragma once
#include "ordering.h"

namespace standin {

const uint8_t poison = 0xA5;

static inline std::set<Allocation*>& staged() {
    static auto* all = new std::set<Allocation*>;
    return *all;
}
static inline bool overlap(const Range& a, const Range& b) { return a.begin < b.end && b.begin < a.end; }
static inline bool overlap(const Range& a, const std::vector<Range>& many) {
    return std::any_of(many.begin(), many.end(), [&](const Range& it) { return overlap(a, it); });
}
static inline uint8_t* bytes_at(const Allocation& allocation, uint64_t offset) {
    return (uint8_t*)allocation.begin + offset;
}

static inline uint64_t hash(const uint8_t* bytes, uint64_t count) {
    uint64_t state = count, word = 0;
    for (; count >= 8; bytes += 8, count -= 8) {
        memcpy(&word, bytes, 8);
        state = (state ^ word) * 0x9E3779B97F4A7C15u;
        state ^= state >> 29;
    }
    word = 0;
    memcpy(&word, bytes, count);
    state = (state ^ word) * 0x9E3779B97F4A7C15u;
    return state ^ state >> 32;
}

static inline void hide(Allocation& allocation, Arrival& it) {
    uint8_t* begin = bytes_at(allocation, it.range.begin);
    it.data.assign(begin, begin + (it.range.end - it.range.begin));
    memset(begin, poison, it.data.size());
    it.visible = false;
}
// Lets a late copy read its source.
static inline void finish(Arrival& it) {
    if (it.source) memcpy(it.data.data(), it.source, it.data.size());
    it.source = nullptr;
}
static inline void show(Allocation& allocation, Arrival& it) {
    finish(it);
    if (it.visible) return;
    uint8_t* begin = bytes_at(allocation, it.range.begin);
    bool untouched = begin[0] == poison && memcmp(begin, begin + 1, it.data.size() - 1) == 0;
    if (!untouched)
        break_device(launch_failed, "the host wrote to %s without waiting for %s, which writes there",
                     describe(it.range, allocation).c_str(), describe(it.work).c_str());
    memcpy(begin, it.data.data(), it.data.size());
    it.visible = true;
}
static inline void show_overlapping(Allocation& allocation, const Range& range) {
    for (auto& it : allocation.arrivals)
        if (overlap(it.range, range)) show(allocation, it);
}
static inline void hide_all(Allocation& allocation) {
    for (auto& it : allocation.arrivals)
        if (it.visible) hide(allocation, it);
}
static inline void check_unchanged(Allocation& allocation, const Departure& it) {
    show_overlapping(allocation, it.range);
    if (hash(bytes_at(allocation, it.range.begin), it.range.end - it.range.begin) == it.hash) return;
    break_device(launch_failed, "the host changed %s without waiting for %s, which reads it",
                 describe(it.range, allocation).c_str(), describe(it.work).c_str());
}

// Shows memory as the device sees it, before work that may touch `range`.
static inline void open_for_device(Allocation& allocation, Range range, Access access) {
    if (allocation.kind != pinned_memory) return;
    show_overlapping(allocation, range);
    if (access == reads) return;
    for (auto& it : allocation.departures)
        if (overlap(it.range, range)) check_unchanged(allocation, it);
}

// Shows memory as the host sees it, after work. An earlier arrival that was overwritten in part is dropped as a whole,
// so the host sees the rest of it a little early.
static inline void close_for_device(Allocation& allocation, const std::vector<Range>& read,
                                    const std::vector<Range>& written, Work work) {
    if (allocation.kind != pinned_memory) return;
    remove_where(allocation.departures, [&](const Departure& it) { return overlap(it.range, written); });
    remove_where(allocation.arrivals, [&](const Arrival& it) { return overlap(it.range, written); });
    for (auto& it : read)
        if (!overlap(it, written))
            allocation.departures.push_back({it, work, hash(bytes_at(allocation, it.begin), it.end - it.begin)});
    for (auto& it : written) allocation.arrivals.push_back({it, work, {}, true, nullptr});
    hide_all(allocation);
    staged().insert(&allocation);
}

static inline void open_for_device(const Span& span, Access access) {
    if (span.memory) open_for_device(*span.memory, {span.offset(), span.offset() + span.bytes}, access);
}
static inline void close_for_device(const Span& span, Access access, Work work) {
    if (!span.memory) return;
    std::vector<Range> touched{{span.offset(), span.offset() + span.bytes}}, none;
    close_for_device(*span.memory, access == reads ? touched : none, access == writes ? touched : none, work);
}

// Copies to the host may read their source as late as a device may: when a stream or the host has waited for them, or
// at the next work of their own stream. A test in the same process can then change device memory too early.
static inline void finish_late_copies(const Clock& clock) {
    for (Allocation* allocation : staged())
        for (auto& it : allocation->arrivals)
            if (it.source && done_before(it.work, clock)) finish(it);
}
static inline void delay(const Span& to, const Span& from, Work work) {
    if (!on_reached || !to.memory || to.memory->kind != pinned_memory) return;
    for (auto& it : to.memory->arrivals)
        if (it.work == work) it.source = (const uint8_t*)from.data();
}

// Advances the host to a clock: writes that it covers become visible, and memory that was read may change.
static inline void host_reaches(const Clock& clock) {
    Clock& host = ordering().host;
    host.join(clock);
    host.time = 0;
    host_time() = std::max(host_time(), clock.time);
    if (on_reached) on_reached(host);
    for (auto at = staged().begin(); at != staged().end();) {
        Allocation& allocation = **at;
        for (auto& it : allocation.arrivals)
            if (done_before(it.work, host)) show(allocation, it);
        remove_where(allocation.arrivals, [&](const Arrival& it) { return done_before(it.work, host); });
        for (auto& it : allocation.departures)
            if (done_before(it.work, host)) check_unchanged(allocation, it);
        remove_where(allocation.departures, [&](const Departure& it) { return done_before(it.work, host); });
        at = allocation.arrivals.empty() && allocation.departures.empty() ? staged().erase(at) : std::next(at);
    }
}

}  // namespace standin
