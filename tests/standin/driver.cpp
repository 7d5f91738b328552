// A libcuda.so.1 for machines without a GPU: see README.md. This file holds the entry points.
#include <chrono>
#include <mutex>

#include "staging.h"
// The kernels come last: their names and macros are global.
#include "kernels.h"

namespace standin {

#define API extern "C" __attribute__((visibility("default"))) int
typedef unsigned long long Pointer;

struct Function;
struct Module { Context* context; std::map<std::string, Function*> functions; };
struct Function { Module* module; std::string name; Runner run; };

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

// Every call: one at a time, and none but the tolerant ones once the device is broken.
enum Tolerance { strict, tolerant };
template <class Body> static int call(Tolerance tolerance, Body body) {
    std::lock_guard<std::recursive_mutex> guard(driver().lock);
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
    if (!known.count(handle)) refuse(invalid_handle, "%p is no live %s", handle, what);
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
// The stream that takes work: it must be of the current context, which a wait need not be.
static Stream& working_stream(void* handle) {
    Stream& stream = stream_of(handle);
    if (stream.context != &context())
        refuse(invalid_handle, "%s is used in the context of device %d", ordering().lanes[stream.lane].c_str(), current->device);
    return stream;
}
static Event& event_of(void* handle) { return live<Event>(driver().events, handle, "event"); }

// ---- Errors, initialization, devices

static const CodeName* find_code(int code) {
    for (auto& it : code_names)
        if (it.code == code) return &it;
    return nullptr;
}
API cuGetErrorName(int code, const char** name) {
    const CodeName* it = find_code(code);
    *name = it ? it->name : nullptr;
    return it ? success : invalid_value;
}
API cuGetErrorString(int code, const char** text) {
    const CodeName* it = find_code(code);
    *text = it ? it->text : nullptr;
    return it ? success : invalid_value;
}
API cuInit(unsigned) {
    return call(tolerant, [] {
        if (settings().init) throw Failure{(int)settings().init, false, ""};
        if (settings().devices == 0) throw Failure{no_device, false, ""};
        driver().initialized = true;
    });
}
API cuDriverGetVersion(int* version) { return *version = (int)settings().driver, success; }
API cuDeviceGetCount(int* count) {
    return call(tolerant, [=] { need_initialized(), *count = (int)settings().devices; });
}
API cuDeviceGet(int* device, int ordinal) {
    return call(tolerant, [=] { *device = checked_device(ordinal); });
}
API cuDeviceGetName(char* name, int bytes, int device) {
    return call(tolerant, [=] { snprintf(name, bytes, "Stand-in GPU %d", checked_device(device)); });
}
API cuDeviceGetUuid_v2(char* uuid, int device) {
    return call(tolerant, [=] { memset(uuid, 0x5D, 16), uuid[15] = (char)checked_device(device); });
}
API cuDeviceGetUuid(char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
API cuDeviceGetPCIBusId(char* text, int bytes, int device) {
    return call(tolerant, [=] { snprintf(text, bytes, "0000:%02x:00.0", checked_device(device) + 1); });
}
API cuDeviceTotalMem_v2(size_t* bytes, int device) {
    return call(tolerant, [=] { checked_device(device), *bytes = settings().memory; });
}
API cuDeviceGetAttribute(int* value, int attribute, int device) {
    static const std::map<int, int> values{
        {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535},  // threads, blocks, grids
        {8, 49152}, {9, 65536}, {10, 32}, {12, 65536}, {13, 1980000}, {16, 132}, {19, 1}, {31, 1}, {36, 2619000},
        {37, 6144}, {38, 50 << 20}, {39, 2048}, {40, 3}, {41, 1}, {81, 233472}, {82, 65536}, {97, 232448}, {106, 32},
        {115, 1}};
    return call(tolerant, [=] {
        checked_device(device);
        auto at = values.find(attribute);
        int capability = (int)settings().capability;
        *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : at == values.end() ? 0 : at->second;
    });
}
API cuDeviceCanAccessPeer(int* can, int, int) { return *can = 0, success; }

// ---- Contexts

API cuDevicePrimaryCtxRetain(Context** out, int device) {
    return call([=] {
        Context*& it = driver().contexts[checked_device(device)];
        if (!it) {
            it = new Context{device, nullptr, {}, {}, {}};
            it->legacy = new_stream(*it, Stream::legacy, "legacy default stream");
        }
        *out = it;
    });
}
API cuDevicePrimaryCtxRelease_v2(int device) {
    return call(tolerant, [=] { checked_device(device); });
}
API cuCtxGetCurrent(Context** out) {
    return call(tolerant, [=] { need_initialized(), *out = current; });
}
API cuCtxSetCurrent(Context* it) {
    return call(tolerant, [=] { need_initialized(), current = it; });
}
API cuCtxGetDevice(int* device) {
    return call(tolerant, [=] { *device = context().device; });
}
API cuCtxGetApiVersion(Context*, unsigned* version) { return *version = 3020, success; }
API cuCtxSetFlags(unsigned) { return call([] { context(); }); }
API cuCtxSetLimit(int, size_t) { return call([] { context(); }); }
API cuCtxGetLimit(size_t* value, int) { return call([=] { context(), *value = 1024; }); }
API cuCtxSetCacheConfig(int) { return call([] { context(); }); }
API cuCtxGetCacheConfig(int* value) { return call([=] { context(), *value = 0; }); }
API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    return call([=] { context(), *least = 0, *greatest = -5; });
}

// ---- Waiting: the host catches up with a clock

static void host_waits(const Clock& clock) {
    count("host_waits")++;
    host_reaches(clock);
}
// A query succeeds only after a few refusals, unless the host knows already that the work is done.
static void query(const Clock& clock, uint64_t& refusals) {
    if (ordering().host.covers(clock)) return;
    if (refusals > 0) {
        refusals--;
        throw Failure{not_ready, false, ""};
    }
    host_reaches(clock);
}
API cuCtxSynchronize() { return call([] { host_waits(context().everything); }); }

// ---- Streams and events

API cuStreamCreateWithPriority(void** out, unsigned flags, int) {
    return call([=] {
        Stream* made = flags & 1 ? new_stream(context(), Stream::non_blocking, "non-blocking stream")
                                 : new_stream(context(), Stream::blocking, "blocking stream");
        driver().streams.insert(made);
        *out = made;
    });
}
API cuStreamCreate(void** out, unsigned flags) { return cuStreamCreateWithPriority(out, flags, 0); }
API cuStreamDestroy_v2(void* handle) {
    return call(tolerant, [=] {
        Stream* gone = &live<Stream>(driver().streams, handle, "stream");
        driver().streams.erase(gone);
        delete gone;
        if (sticky_code) throw Failure{sticky_code, true, ""};
    });
}
API cuStreamSynchronize(void* stream) {
    return call([=] { host_waits(stream_of(stream).clock); });
}
API cuStreamQuery(void* handle) {
    return call([=] {
        Stream& stream = stream_of(handle);
        query(stream.clock, stream.queries);
    });
}
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
    return call([=] { wait_for(stream_of(stream), event_of(event)); });
}
API cuStreamIsCapturing(void*, int* status) { return *status = 0, success; }

static double milliseconds_now() {
    auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double, std::milli>(now).count();
}
API cuEventCreate(void** out, unsigned flags) {
    return call([=] {
        auto* made = new Event{&context(), !(flags & 2), false, {}, 0, 0};
        driver().events.insert(made);
        *out = made;
    });
}
API cuEventDestroy_v2(void* handle) {
    return call(tolerant, [=] {
        Event* gone = &event_of(handle);
        driver().events.erase(gone);
        delete gone;
        if (sticky_code) throw Failure{sticky_code, true, ""};
    });
}
API cuEventRecord(void* handle, void* stream_handle) {
    return call([=] {
        Event& event = event_of(handle);
        Stream& stream = stream_of(stream_handle);
        if (event.context != stream.context) refuse(invalid_handle, "the event and the stream are of different contexts");
        count("events")++;
        record(event, stream);
        event.milliseconds = milliseconds_now();
    });
}
API cuEventSynchronize(void* event) {
    return call([=] { host_waits(event_of(event).clock); });
}
API cuEventQuery(void* handle) {
    return call([=] {
        Event& event = event_of(handle);
        query(event.clock, event.queries);
    });
}
API cuEventElapsedTime_v2(float* milliseconds, void* first, void* last) {
    return call([=] {
        Event &start = event_of(first), &end = event_of(last);
        if (!start.timed || !end.timed || !start.recorded || !end.recorded)
            refuse(invalid_handle, "elapsed time needs two recorded events that were created with timing");
        if (!ordering().host.covers(start.clock) || !ordering().host.covers(end.clock)) throw Failure{not_ready, false, ""};
        *milliseconds = (float)(end.milliseconds - start.milliseconds);
    });
}
API cuEventElapsedTime(float* milliseconds, void* first, void* last) { return cuEventElapsedTime_v2(milliseconds, first, last); }

// ---- Memory

static void* new_memory(Kind kind, uint64_t bytes, bool stream_ordered) {
    return (void*)allocate(kind, context().device, bytes, stream_ordered).begin;
}
API cuMemAlloc_v2(Pointer* out, size_t bytes) {
    return call([=] { *out = (Pointer)new_memory(device_memory, bytes, false); });
}
API cuMemAllocAsync(Pointer* out, size_t bytes, void* handle) {
    return call([=] {
        Stream& stream = working_stream(handle);
        Allocation& made = allocate(device_memory, stream.context->device, bytes, true);
        note(whole(made), writes, enqueue(stream, "cuMemAllocAsync"), stream.clock);
        *out = made.begin;
    });
}
API cuMemHostAlloc(void** out, size_t bytes, unsigned) {
    return call([=] { *out = new_memory(pinned_memory, bytes, false); });
}
API cuMemAllocHost_v2(void** out, size_t bytes) { return cuMemHostAlloc(out, bytes, 0); }
API cuMemHostGetDevicePointer_v2(Pointer* out, void* pointer, unsigned) {
    return call([=] { *out = device_span("cuMemHostGetDevicePointer", context().device, (uintptr_t)pointer, 1).address; });
}
static void check_finished(const Allocation& gone) {
    if (Work work = unfinished(gone))
        break_device(launch_failed, "freeing %s, while the host has not waited for %s", gone.name().c_str(), describe(work).c_str());
}
// Waits for the whole device, but not where the memory came from cuMemAllocAsync: the caller has to.
API cuMemFree_v2(Pointer pointer) {
    return call(tolerant, [=] {
        if (!pointer) return;
        Allocation& gone = owned(pointer, device_memory);
        if (!sticky_code && gone.stream_ordered) check_finished(gone);
        if (!sticky_code && !gone.stream_ordered) host_waits(driver().contexts[gone.device]->everything);
        deallocate(gone);
    });
}
API cuMemFreeAsync(Pointer pointer, void* handle) {
    return call(tolerant, [=] {
        Allocation& gone = owned(pointer, device_memory);
        if (!sticky_code) {
            Stream& stream = working_stream(handle);
            note(whole(gone), writes, enqueue(stream, "cuMemFreeAsync"), stream.clock);
        }
        deallocate(gone);
    });
}
API cuMemFreeHost(void* pointer) {
    return call(tolerant, [=] {
        Allocation& gone = owned((uintptr_t)pointer, pinned_memory);
        if (!sticky_code) check_finished(gone);
        staged().erase(&gone);
        deallocate(gone);
    });
}
API cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    return call([=] { *total = settings().memory, *free_bytes = *total - memory().device_bytes[context().device]; });
}
API cuPointerGetAttribute(void* out, int attribute, Pointer pointer) {
    return call([=] {
        Allocation* it = find(pointer);
        if (!it) throw Failure{invalid_value, false, ""};
        if (attribute == 1) *(void**)out = driver().contexts[it->device];
        else if (attribute == 2) *(unsigned*)out = it->kind == device_memory ? 2 : 1;
        else if (attribute == 3 || attribute == 4) *(Pointer*)out = pointer;
        else if (attribute == 9) *(int*)out = it->device;
        else if (attribute == 11) *(Pointer*)out = it->begin;
        else if (attribute == 12) *(size_t*)out = it->bytes;
        else refuse(not_supported, "pointer attribute %d", attribute);
    });
}

// ---- Copies and memsets

static void count_copy(const char* direction, uint64_t bytes) {
    if (++count("copies") == settings().fail_copy) break_device(launch_failed, "copy %llu fails, as told by STANDIN_FAIL_COPY",
                                                               (unsigned long long)settings().fail_copy);
    count(direction) += bytes;
}
static void copy(const char* name, Stream& stream, const Span& to, const Span& from) {
    Work work = enqueue(stream, name);
    note(from, reads, work, stream.clock), note(to, writes, work, stream.clock);
    open_for_device(from, reads), open_for_device(to, writes);
    memcpy(to.data(), from.data(), to.bytes);
    close_for_device(from, reads, work), close_for_device(to, writes, work);
}
static void copy_to_device(const char* name, void* handle, Pointer dst, const void* src, size_t bytes, bool wait) {
    Stream& stream = working_stream(handle);
    if (!bytes) return;
    Span to = device_span(name, context().device, dst, bytes), from = host_span(name, src, bytes);
    count_copy("h2d_bytes", bytes);
    catch_up(stream);
    // From pageable memory CUDA waits for the stream first, and returns when the source has been read, not copied.
    if (wait && !from.memory) host_waits(stream.clock);
    copy(name, stream, to, from);
    if (wait && from.memory) host_waits(stream.clock);
}
static void copy_to_host(const char* name, void* handle, void* dst, Pointer src, size_t bytes, bool wait) {
    Stream& stream = working_stream(handle);
    if (!bytes) return;
    Span to = host_span(name, dst, bytes), from = device_span(name, context().device, src, bytes);
    count_copy("d2h_bytes", bytes);
    copy(name, stream, to, from);
    if (wait || !to.memory) host_waits(stream.clock);  // a copy to pageable memory returns when it is done
}
static void copy_on_device(const char* name, void* handle, Pointer dst, int dst_device, Pointer src, int src_device, size_t bytes) {
    Stream& stream = working_stream(handle);
    if (!bytes) return;
    Span to = device_span(name, dst_device, dst, bytes), from = device_span(name, src_device, src, bytes);
    if (dst < src + bytes && src < dst + bytes) refuse(invalid_value, "%s: source and destination overlap", name);
    count_copy("d2d_bytes", bytes);
    copy(name, stream, to, from);
}
API cuMemcpyHtoD_v2(Pointer dst, const void* src, size_t bytes) {
    return call([=] { copy_to_device("cuMemcpyHtoD", nullptr, dst, src, bytes, true); });
}
API cuMemcpyHtoDAsync_v2(Pointer dst, const void* src, size_t bytes, void* stream) {
    return call([=] { copy_to_device("cuMemcpyHtoDAsync", stream, dst, src, bytes, false); });
}
API cuMemcpyDtoH_v2(void* dst, Pointer src, size_t bytes) {
    return call([=] { copy_to_host("cuMemcpyDtoH", nullptr, dst, src, bytes, true); });
}
API cuMemcpyDtoHAsync_v2(void* dst, Pointer src, size_t bytes, void* stream) {
    return call([=] { copy_to_host("cuMemcpyDtoHAsync", stream, dst, src, bytes, false); });
}
// Not even the plain form waits: CUDA copies within a device asynchronously.
API cuMemcpyDtoDAsync_v2(Pointer dst, Pointer src, size_t bytes, void* stream) {
    return call([=] { copy_on_device("cuMemcpyDtoDAsync", stream, dst, context().device, src, context().device, bytes); });
}
API cuMemcpyDtoD_v2(Pointer dst, Pointer src, size_t bytes) { return cuMemcpyDtoDAsync_v2(dst, src, bytes, nullptr); }
API cuMemcpyPeerAsync(Pointer dst, Context* to, Pointer src, Context* from, size_t bytes, void* stream) {
    return call([=] { copy_on_device("cuMemcpyPeerAsync", stream, dst, to->device, src, from->device, bytes); });
}

template <class T> static void fill(const char* name, void* handle, Pointer dst, T value, size_t elements) {
    Stream& stream = working_stream(handle);
    if (!elements) return;
    if (dst % sizeof(T)) refuse(invalid_value, "%s: 0x%llx is misaligned", name, dst);
    Span to = device_span(name, context().device, dst, elements * sizeof(T));
    count("memsets")++;
    Work work = enqueue(stream, name);
    note(to, writes, work, stream.clock);
    open_for_device(to, writes);
    std::fill_n((T*)to.data(), elements, value);
    close_for_device(to, writes, work);
}
API cuMemsetD8Async(Pointer dst, unsigned char value, size_t elements, void* stream) {
    return call([=] { fill("cuMemsetD8Async", stream, dst, value, elements); });
}
API cuMemsetD16Async(Pointer dst, unsigned short value, size_t elements, void* stream) {
    return call([=] { fill("cuMemsetD16Async", stream, dst, value, elements); });
}
API cuMemsetD32Async(Pointer dst, unsigned value, size_t elements, void* stream) {
    return call([=] { fill("cuMemsetD32Async", stream, dst, value, elements); });
}
API cuMemsetD8_v2(Pointer dst, unsigned char value, size_t elements) { return cuMemsetD8Async(dst, value, elements, nullptr); }
API cuMemsetD32_v2(Pointer dst, unsigned value, size_t elements) { return cuMemsetD32Async(dst, value, elements, nullptr); }

// ---- Modules and launches

API cuModuleLoadData(void** out, const void* image) {
    return call([=] {
        const uint32_t fatbin_magic = 0xba55ed50;
        if (memcmp(image, &fatbin_magic, 4)) refuse(invalid_image, "the image is no fatbin");
        if (settings().reject_image) throw Failure{no_binary_for_gpu, false, ""};
        if (settings().driver < 13000) throw Failure{unsupported_ptx, false, ""};
        auto* made = new Module{&context(), {}};
        driver().modules.insert(made);
        *out = made;
    });
}
API cuModuleUnload(void* handle) {
    return call(tolerant, [=] {
        Module* gone = &live<Module>(driver().modules, handle, "module");
        for (auto& [name, function] : gone->functions) driver().functions.erase(function), delete function;
        driver().modules.erase(gone);
        delete gone;
        if (sticky_code) throw Failure{sticky_code, true, ""};
    });
}
API cuModuleGetFunction(void** out, void* handle, const char* name) {
    return call([=] {
        Module& module = live<Module>(driver().modules, handle, "module");
        Runner run = kernel_named(name);
        if (!run) refuse(not_found, "there is no kernel %s", name);
        Function*& function = module.functions[name];
        if (!function) driver().functions.insert(function = new Function{&module, name, run});
        *out = function;
    });
}
API cuFuncGetAttribute(int* value, int attribute, void* handle) {
    return call([=] {
        live<Function>(driver().functions, handle, "function");
        int capability = (int)settings().capability;
        *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : attribute == 5 || attribute == 6 ? capability : 0;
    });
}
API cuFuncSetAttribute(void*, int, int) { return call([] { context(); }); }
API cuFuncSetCacheConfig(void*, int) { return call([] { context(); }); }
API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void* handle, int threads, size_t, unsigned) {
    return call([=] {
        live<Function>(driver().functions, handle, "function");
        *blocks = threads > 0 ? std::min(2048 / threads, 32) : 0;
    });
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* handle, int threads, size_t shared) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, handle, threads, shared, 0);
}

static void check_extents(const char* kernel, const standin_index& grid, const standin_index& block) {
    bool fits = volume(block) > 0 && volume(block) <= 1024 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
                volume(grid) > 0 && grid.x <= 2147483647u && grid.y <= 65535 && grid.z <= 65535;
    if (!fits)
        refuse(invalid_value, "kernel %s: no device takes a grid of %u x %u x %u blocks of %u x %u x %u threads", kernel,
               grid.x, grid.y, grid.z, block.x, block.y, block.z);
}
// Takes the marks of the launch from every allocation, and orders them unless the kernel failed.
static void finish_launch(Stream& stream, Work work) {
    for (Allocation* it : launch.touched) {
        auto read = take_ranges(*it, reads), written = take_ranges(*it, writes);
        it->touched_first = 1, it->touched_last = 0;
        for (const Range& range : read) count("kernel_read_bytes") += range.end - range.begin;
        for (const Range& range : written) count("kernel_written_bytes") += range.end - range.begin;
        if (!work) read.clear(), written.clear();
        for (const Range& range : read) note_read(*it, range, work, stream.clock);
        for (const Range& range : written) note_write(*it, range, work, stream.clock);
        close_for_device(*it, read, written, work);
    }
}
static void run_kernel(const Function& function, Stream& stream, const void* arguments) {
    Work work = enqueue(stream, "kernel " + function.name);
    // Which pinned memory a kernel touches shows only as it runs: each is opened as a whole when it does.
    auto open = [](Allocation& it) { open_for_device(it, {0, it.bytes}, writes); };
    begin_touching(function.name.c_str(), stream.context->device, open);
    try {
        function.run(arguments, settings().reverse);
    } catch (...) {
        finish_launch(stream, 0);
        throw;
    }
    finish_launch(stream, work);
}
API cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned,
                   void* stream_handle, void** arguments, void**) {
    return call([=] {
        Function& function = live<Function>(driver().functions, handle, "function");
        Stream& stream = working_stream(stream_handle);
        const char* name = function.name.c_str();
        if (function.module->context != stream.context) refuse(invalid_handle, "kernel %s is of another context", name);
        check_extents(name, {gx, gy, gz}, {bx, by, bz});
        if (++count("launches") == settings().fail_launch)
            break_device(illegal_address, "kernel %s: this launch fails, as told by STANDIN_FAIL_LAUNCH", name);
        gridDim = {gx, gy, gz}, blockDim = {bx, by, bz};
        run_kernel(function, stream, arguments[0]);
    });
}

// ---- What the project has no use for

#define UNSUPPORTED(name) \
    API name() { return call([] { refuse(not_supported, #name " is not part of the stand-in"); }); }
UNSUPPORTED(cuCtxCreate_v2) UNSUPPORTED(cuCtxCreate_v3) UNSUPPORTED(cuCtxCreate_v4) UNSUPPORTED(cuCtxDestroy_v2)
UNSUPPORTED(cuDeviceGetDefaultMemPool) UNSUPPORTED(cuDeviceGetMemPool) UNSUPPORTED(cuDeviceSetMemPool)
UNSUPPORTED(cuMemAllocFromPoolAsync) UNSUPPORTED(cuMemPoolCreate) UNSUPPORTED(cuMemPoolDestroy)
UNSUPPORTED(cuMemPoolGetAttribute) UNSUPPORTED(cuMemPoolSetAttribute) UNSUPPORTED(cuMemPoolTrimTo)
UNSUPPORTED(cuMemAllocManaged) UNSUPPORTED(cuMemAdvise_v2) UNSUPPORTED(cuMemPrefetchAsync_v2)
UNSUPPORTED(cuStreamAttachMemAsync) UNSUPPORTED(cuStreamBeginCapture_v2) UNSUPPORTED(cuStreamEndCapture)
UNSUPPORTED(cuLaunchHostFunc) UNSUPPORTED(cuLaunchCooperativeKernel) UNSUPPORTED(cuModuleLoad)
UNSUPPORTED(cuModuleGetGlobal_v2) UNSUPPORTED(cuMemHostRegister_v2) UNSUPPORTED(cuMemHostUnregister)

// ---- For tests

extern "C" __attribute__((visibility("default"))) uint64_t standin_count(const char* what) {
    std::lock_guard<std::recursive_mutex> guard(driver().lock);
    auto at = counters().find(what);
    if (at != counters().end()) return at->second;
    fprintf(stderr, "stand-in driver: nothing is counted as \"%s\"\n", what);
    return UINT64_MAX;
}

}  // namespace standin
