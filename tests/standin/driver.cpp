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
UNSUPPORTED(cuModuleGetGlobal_v2) UNSUPPORTED(cuMemHostRegister_v2) UNSUPPORTED(cuMemHostUnregister)

// ---- For tests

extern "C" __attribute__((visibility("default"))) uint64_t standin_count(const char* what) {
    std::lock_guard<std::recursive_mutex> guard(driver().lock);
    auto at = counters().find(what);
    if (at != counters().end()) return at->second;
    fprintf(stderr, "stand-in driver: there is no counter \"%s\"\n", what);
    return UINT64_MAX;
}

}  // namespace standin
