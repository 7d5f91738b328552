// A libcuda.so.1 for machines without a GPU: see README.md.
#include "allocations.h"
#include "copies.h"
#include "devices.h"
#include "streams.h"
#include "launches.h"  // last: the names and macros of the kernels are global

namespace standin {

// ---- Entry points that the project does not use

#define UNSUPPORTED(name) \
    API name() { return call([] { refuse(not_supported, #name " is not part of the stand-in"); }); }
UNSUPPORTED(cuCtxCreate_v2) UNSUPPORTED(cuCtxCreate_v3) UNSUPPORTED(cuCtxCreate_v4) UNSUPPORTED(cuCtxDestroy_v2)
UNSUPPORTED(cuDeviceGetDefaultMemPool) UNSUPPORTED(cuDeviceGetMemPool) UNSUPPORTED(cuDeviceSetMemPool)
UNSUPPORTED(cuMemAllocFromPoolAsync) UNSUPPORTED(cuMemPoolCreate) UNSUPPORTED(cuMemPoolDestroy)
UNSUPPORTED(cuMemPoolGetAttribute) UNSUPPORTED(cuMemPoolSetAttribute) UNSUPPORTED(cuMemPoolTrimTo)
UNSUPPORTED(cuMemAllocManaged) UNSUPPORTED(cuMemAdvise_v2) UNSUPPORTED(cuMemPrefetchAsync_v2)
UNSUPPORTED(cuStreamAttachMemAsync)
UNSUPPORTED(cuLaunchHostFunc) UNSUPPORTED(cuLaunchCooperativeKernel) UNSUPPORTED(cuModuleLoad)
UNSUPPORTED(cuModuleGetGlobal_v2)

// ---- For tests

extern "C" __attribute__((visibility("default"))) uint64_t standin_count(const char* what) {
    std::lock_guard<std::recursive_mutex> guard(driver().lock);
    auto at = counters().find(what);
    if (at != counters().end()) return at->second;
    fprintf(stderr, "stand-in driver: there is no counter \"%s\"\n", what);
    return UINT64_MAX;
}

// Simulates work of a length in nanoseconds on a stream.
extern "C" __attribute__((visibility("default"))) void standin_work(void* stream, uint64_t nanoseconds) {
    std::lock_guard<std::recursive_mutex> guard(driver().lock);
    spend(stream_of(stream), nanoseconds);
}

// Returns the nanoseconds for which waits for events have held a stream up.
extern "C" __attribute__((visibility("default"))) uint64_t standin_stalled(void* stream) {
    std::lock_guard<std::recursive_mutex> guard(driver().lock);
    return stream_of(stream).stalled;
}

// Switches late copies on or off.
extern "C" __attribute__((visibility("default"))) void standin_late_copies(int on) {
    std::lock_guard<std::recursive_mutex> guard(driver().lock);
    for (Allocation* allocation : staged())
        for (auto& it : allocation->arrivals) finish(it);
    on_reached = on ? finish_late_copies : nullptr;
}

}  // namespace standin
