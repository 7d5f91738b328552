// Streams, events and vector clocks. Work runs at once, in the order of the calls; the clocks show which work a device
// could have run in another order.
//
// Clocks also have a time, in nanoseconds of a simple device: work takes as long as its bytes do on the bus or in the
// device's memory, and calls of the host take no time. It shows how long a stream waits for another one.
//
// A lane is a stream's place in the clocks. All host threads share one clock, because the driver cannot see how they
// wait for each other: a wait of one thread counts for all. The time alone is each thread's own, so that stalls do not
// depend on when another thread runs.
#pragma once
#include <algorithm>
#include <set>

#include "access.h"

namespace standin {

struct Clock {
    std::vector<uint64_t> lanes;
    uint64_t time = 0;
    uint64_t at(unsigned lane) const { return lane < lanes.size() ? lanes[lane] : 0; }
    void join(const Clock& other) {
        if (lanes.size() < other.lanes.size()) lanes.resize(other.lanes.size());
        for (size_t i = 0; i < other.lanes.size(); i++) lanes[i] = std::max(lanes[i], other.lanes[i]);
        time = std::max(time, other.time);
    }
    uint64_t tick(unsigned lane) {
        if (lanes.size() <= lane) lanes.resize(lane + 1);
        return ++lanes[lane];
    }
    bool covers(const Clock& other) const {
        for (size_t i = 0; i < other.lanes.size(); i++)
            if (at(i) < other.lanes[i]) return false;
        return true;
    }
};

struct Stream {
    struct Context* context;
    unsigned lane;
    enum { legacy, blocking, non_blocking } kind;
    Clock clock;
    uint64_t queries;  // "not ready" answers that are left to give
    uint64_t stalled = 0;  // nanoseconds for which events have held the stream up
};

// Primary context of a device. `everything` covers all work enqueued in it, `blocking` the blocking streams', which the
// legacy default stream waits for.
struct Context {
    int device;
    Stream* legacy;
    Clock everything, blocking;
    std::map<uint64_t, Stream*> per_thread;
};

struct Event {
    Context* context;
    bool timed, recorded, sleeps;  // the host sleeps while it waits, instead of spinning
    Clock clock;
    uint64_t queries;
    double milliseconds;
};

// Piece of work. Records refer to it by number; 0 is no work, which is ordered before everything.
struct Operation {
    unsigned lane;
    uint64_t time;
    const char* name;
};

struct Ordering {
    Clock host;
    std::vector<Operation> operations{{0, 0, "nothing"}};
    std::vector<std::string> lanes{"host"};
    std::set<std::string> names;  // of work; they outlive the modules of kernels
};
static inline Ordering& ordering() {
    static auto* all = new Ordering;
    return *all;
}

// Time that the calling thread has waited until. The time of `Ordering::host` is not used.
static inline uint64_t& host_time() {
    static thread_local uint64_t time = 0;
    return time;
}

static inline bool done_before(Work work, const Clock& clock) {
    const Operation& it = ordering().operations[work];
    return clock.at(it.lane) >= it.time;
}
static inline std::string describe(Work work) {
    const Operation& it = ordering().operations[work];
    return std::string(it.name) + " on " + ordering().lanes[it.lane];
}

static inline Stream* new_stream(Context& context, decltype(Stream::kind) kind, const char* what) {
    unsigned lane = (unsigned)ordering().lanes.size();
    std::string name = what + (" " + std::to_string(lane)) + " of device " + std::to_string(context.device);
    ordering().lanes.push_back(name);
    return new Stream{&context, lane, kind, {}, 0, 0};
}

// Orders the next work of a stream after all that the host has waited for. The legacy default stream and the blocking
// streams also wait for each other.
static inline void catch_up(Stream& stream) {
    stream.clock.join(ordering().host);
    stream.clock.time = std::max(stream.clock.time, host_time());
    if (stream.kind == Stream::legacy) stream.clock.join(stream.context->blocking);
    if (stream.kind == Stream::blocking) stream.clock.join(stream.context->legacy->clock);
}
static inline void publish(Stream& stream) {
    stream.context->everything.join(stream.clock);
    if (stream.kind == Stream::blocking) stream.context->blocking.join(stream.clock);
}
// Called with a clock that a stream or the host has reached, before anything after it can happen.
static void (*on_reached)(const Clock&) = nullptr;

// Lets a stream be busy.
static inline void spend(Stream& stream, uint64_t nanoseconds) {
    catch_up(stream);
    stream.clock.time += nanoseconds;
    publish(stream);
}
static inline Work enqueue(Stream& stream, const std::string& name) {
    catch_up(stream);
    if (on_reached) on_reached(stream.clock);
    uint64_t time = stream.clock.tick(stream.lane);
    publish(stream);
    stream.queries = settings().queries;
    const char* kept = ordering().names.insert(name).first->c_str();
    ordering().operations.push_back({stream.lane, time, kept});
    return (Work)(ordering().operations.size() - 1);
}
static inline void record(Event& event, Stream& stream) {
    catch_up(stream);
    publish(stream);
    event.clock = stream.clock, event.recorded = true, event.queries = settings().queries;
}
static inline void wait_for(Stream& stream, const Event& event) {
    catch_up(stream);
    uint64_t before = stream.clock.time;
    stream.clock.join(event.clock);
    stream.stalled += stream.clock.time - before;
    publish(stream);
    if (on_reached) on_reached(stream.clock);
}

// ---- Bytes and the work that touched them

template <class T, class Condition> static void remove_where(std::vector<T>& items, Condition condition) {
    items.erase(std::remove_if(items.begin(), items.end(), condition), items.end());
}
static inline std::string describe(const Range& range, const Allocation& allocation) {
    return "bytes [" + std::to_string(range.begin) + ", " + std::to_string(range.end) + ") of " + allocation.name();
}
[[noreturn]] __attribute__((cold)) static inline void conflict(const Allocation& allocation, Range range, Work work,
                                                               const char* does, Work earlier, const char* did) {
    break_device(launch_failed, "%s %s %s, which %s %s, and nothing orders the two: an event or a wait is missing",
                 describe(work).c_str(), does, describe(range, allocation).c_str(), describe(earlier).c_str(), did);
}

static inline void split(std::map<uint64_t, Segment>& history, uint64_t at) {
    auto after = history.upper_bound(at);
    if (after == history.begin()) return;
    auto it = std::prev(after);
    if (it->first == at || it->second.end <= at) return;
    Segment tail = it->second;
    it->second.end = at;
    history.emplace_hint(after, at, std::move(tail));
}

static inline void note_write(Allocation& allocation, Range range, Work work, const Clock& clock) {
    auto& history = allocation.history;
    split(history, range.begin), split(history, range.end);
    auto first = history.lower_bound(range.begin), last = history.lower_bound(range.end);
    for (auto it = first; it != last; ++it) {
        Range part{it->first, it->second.end};
        Work writer = it->second.writer;
        if (!done_before(writer, clock)) conflict(allocation, part, work, "writes", writer, "writes");
        for (Work reader : it->second.readers)
            if (!done_before(reader, clock)) conflict(allocation, part, work, "writes", reader, "reads");
    }
    history.erase(first, last);
    history[range.begin] = {range.end, work, {}};
}

// Adds a reader, and drops records that can no longer conflict: readers that the new one follows, and a writer that the
// host has waited for.
static inline void add_reader(Segment& segment, Work work, const Clock& clock) {
    remove_where(segment.readers, [&](Work it) { return done_before(it, clock); });
    segment.readers.push_back(work);
    if (done_before(segment.writer, ordering().host)) segment.writer = 0;
}

static inline void note_read(Allocation& allocation, Range range, Work work, const Clock& clock) {
    auto& history = allocation.history;
    split(history, range.begin), split(history, range.end);
    auto it = history.lower_bound(range.begin);
    for (uint64_t at = range.begin; at < range.end;) {
        if (it == history.end() || it->first > at) {  // not touched before
            uint64_t end = it == history.end() ? range.end : std::min(range.end, it->first);
            it = history.emplace_hint(it, at, Segment{end, 0, {}});
        }
        Segment& here = it->second;
        Range part{at, here.end};
        if (!done_before(here.writer, clock)) conflict(allocation, part, work, "reads", here.writer, "writes");
        add_reader(here, work, clock);
        at = here.end;
        auto next = std::next(it);
        if (it != history.begin()) {
            auto& before = std::prev(it)->second;
            if (before.end == it->first && before.writer == here.writer && before.readers == here.readers)
                before.end = here.end, history.erase(it);
        }
        it = next;
    }
}

static inline void note(const Span& span, Access access, Work work, const Clock& clock) {
    if (!span.memory) return;
    Range range{span.offset(), span.offset() + span.bytes};
    access == reads ? note_read(*span.memory, range, work, clock) : note_write(*span.memory, range, work, clock);
}

// Returns some work on the allocation that the host has not waited for, or 0.
static inline Work unfinished(const Allocation& allocation) {
    const Clock& host = ordering().host;
    for (auto& [begin, segment] : allocation.history) {
        if (!done_before(segment.writer, host)) return segment.writer;
        for (Work reader : segment.readers)
            if (!done_before(reader, host)) return reader;
    }
    return 0;
}

}  // namespace standin
