// Parts of every entry point: the lock, the sticky error, and handles that must be live.
#pragma once
#include <mutex>
#include <thread>

#include "staging.h"

namespace standin {

#define API extern "C" __attribute__((visibility("default"))) int
typedef unsigned long long Pointer;

struct Driver {
    std::recursive_mutex lock;
    bool initialized = false;
    std::map<int, Context*> contexts;
    std::set<const void*> streams, events, modules, functions;
    uint64_t threads = 0;
};
static Driver& driver() {
    static auto* all = new Driver;
    return *all;
}
static thread_local Context* current = nullptr;
static thread_local bool in_callback = false;

// Runs a call: one at a time, and only tolerant ones once the device is broken.
enum Tolerance { strict, tolerant };
template <class Body> static int call(Tolerance tolerance, Body body) {
    std::lock_guard<std::recursive_mutex> guard(driver().lock);
    if (in_callback) return report(Failure{not_permitted, false, "a callback of the driver calls the driver"});
    if (tolerance == strict && sticky_code != success) return sticky_code;
    try {
        body();
        return success;
    } catch (const Failure& failure) {
        return report(failure);
    } catch (const std::bad_alloc&) {
        return out_of_memory;
    }
}
template <class Body> static int call(Body body) { return call(strict, body); }

static void need_initialized() {
    if (!driver().initialized) refuse(not_initialized, "cuInit has not been called");
}
static int checked_device(int device) {
    need_initialized();
    if (device < 0 || (uint64_t)device >= settings().devices) refuse(invalid_device, "there is no device %d", device);
    return device;
}
static Context& context() {
    need_initialized();
    if (!current) refuse(invalid_context, "no context is current on this thread");
    return *current;
}

template <class T> static T& live(const std::set<const void*>& known, void* handle, const char* what) {
    if (!known.count(handle)) refuse(invalid_handle, "%p is not a live %s", handle, what);
    return *(T*)handle;
}
static Stream& per_thread_stream() {
    static thread_local uint64_t thread = 0;
    if (!thread) thread = ++driver().threads;
    Stream*& stream = context().per_thread[thread];
    if (!stream) stream = new_stream(context(), Stream::blocking, "per-thread default stream");
    return *stream;
}
static Stream& stream_of(void* handle) {
    if (handle == nullptr || handle == (void*)1) return *context().legacy;
    if (handle == (void*)2) return per_thread_stream();
    return live<Stream>(driver().streams, handle, "stream");
}
static Event& event_of(void* handle) { return live<Event>(driver().events, handle, "event"); }

}  // namespace standin
