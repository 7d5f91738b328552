// Tests that every check of the stand-in driver can fail, and that correct programs pass. Each case runs in a process
// of its own, which opens the library (built with -DSTANDIN_SELFTEST) with the case's environment variables.
//
//     selftest path/to/libcuda.so.1 [part of the names of cases]
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <thread>
#include <vector>

#include "arithmetic.h"

typedef unsigned long long Pointer;
typedef void* Handle;

static void* library = nullptr;
static int wrong = 0;

template <class... A> static int cu(const char* name, A... arguments) {
    auto function = (int (*)(A...))dlsym(library, name);
    if (!function) return fprintf(stderr, "missing symbol %s\n", name), -1;
    return function(arguments...);
}
static uint64_t counted(const char* what) { return ((uint64_t(*)(const char*))dlsym(library, "standin_count"))(what); }

static void expect_at(int line, const char* what, uint64_t got, uint64_t expected) {
    if (got == expected) return;
    printf("    line %d: %s is %llu, not %llu\n", line, what, (unsigned long long)got, (unsigned long long)expected);
    wrong = 1;
}
#define EXPECT(what, expected) expect_at(__LINE__, #what, what, expected)
#define OK(what) EXPECT(what, 0)
enum { INVALID = 1, MEMORY = 2, NO_DEVICE = 100, IMAGE = 200, CONTEXT = 201, NO_BINARY = 209, PTX = 222, HANDLE = 400,
       NOT_FOUND = 500, NOT_READY = 600, ADDRESS = 700, MISALIGNED = 716, FAILED = 719 };

// ---- Short forms of the driver API

static const uint32_t image[4] = {0xba55ed50};
static Handle context_of(int device) {
    Handle context;
    OK(cu("cuInit", 0u));
    OK(cu("cuDevicePrimaryCtxRetain", &context, device));
    OK(cu("cuCtxSetCurrent", context));
    return context;
}
static Handle kernel(const char* name) {
    Handle module, function;
    OK(cu("cuModuleLoadData", &module, (const void*)image));
    OK(cu("cuModuleGetFunction", &function, module, name));
    return function;
}
static Pointer device(size_t bytes) {
    Pointer made;
    OK(cu("cuMemAlloc_v2", &made, bytes));
    return made;
}
static uint8_t* pinned(size_t bytes) {
    void* made;
    OK(cu("cuMemHostAlloc", &made, bytes, 0u));
    return (uint8_t*)made;
}
static Handle stream(unsigned flags = 1) {
    Handle made;
    OK(cu("cuStreamCreate", &made, flags));
    return made;
}
static Handle event_after(Handle stream) {
    Handle made;
    OK(cu("cuEventCreate", &made, 2u));
    OK(cu("cuEventRecord", made, stream));
    return made;
}
static void order(Handle later, Handle earlier) { OK(cu("cuStreamWaitEvent", later, event_after(earlier), 0u)); }
static int synchronize(Handle stream) { return cu("cuStreamSynchronize", stream); }
static int upload(Pointer dst, const void* src, size_t bytes, Handle stream) {
    return cu("cuMemcpyHtoDAsync_v2", dst, src, bytes, stream);
}
static int download(void* dst, Pointer src, size_t bytes, Handle stream) {
    return cu("cuMemcpyDtoHAsync_v2", dst, src, bytes, stream);
}
static int move(Pointer dst, Pointer src, size_t bytes, Handle stream) {
    return cu("cuMemcpyDtoDAsync_v2", dst, src, bytes, stream);
}
static int fill(Pointer dst, unsigned char value, size_t bytes, Handle stream) {
    return cu("cuMemsetD8Async", dst, value, bytes, stream);
}
template <class Arguments>
static int launch(const char* name, Arguments arguments, Handle stream, unsigned blocks = 2, unsigned threads = 64) {
    void *pointer = &arguments, **parameters = &pointer, **extra = nullptr;
    return cu("cuLaunchKernel", kernel(name), blocks, 1u, 1u, threads, 1u, 1u, 0u, stream, parameters, extra);
}
struct Add { Pointer dst, a, b; uint64_t n; };
struct Vectors { Pointer dst, src; uint64_t n; };
struct Extremes { Pointer src, most, least_index; uint64_t n; };

// Checks that the device is broken: calls return the code, except for tolerant ones.
static void expect_broken(int code) {
    Handle context;
    Pointer made;
    EXPECT(cu("cuCtxSynchronize"), code);
    EXPECT(cu("cuMemAlloc_v2", &made, (size_t)16), code);
    OK(cu("cuCtxGetCurrent", &context));
}

// ---- Cases

struct Case {
    const char *name, *environment, *message;  // message: part of the expected output; null: there must be none
    void (*run)();
};
static std::vector<Case> cases;
static bool add_case(Case it) { return cases.push_back(it), true; }
#define CASE(name, environment, message) \
    static void name(); \
    static const bool name##_added = add_case({#name, environment, message, name}); \
    static void name()

static std::vector<float> ramp(size_t n, float step) {
    std::vector<float> values(n);
    for (size_t i = 0; i < n; i++) values[i] = (float)i * step;
    return values;
}
static size_t differing_sums(const float* sum, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += !(sum[i] == (float)i * 1.5f);
    return count;
}

static void one_stream() {
    context_of(0);
    const size_t n = 5001, bytes = n * 4;
    Pointer a = device(bytes), b = device(bytes), c = device(bytes);
    Handle s = stream();
    std::vector<float> sum(n);
    OK(upload(a, ramp(n, 1).data(), bytes, s));
    OK(upload(b, ramp(n, 0.5).data(), bytes, s));
    OK(launch("add", Add{c, a, b, n}, s, 79));  // over several pages, in either order of the blocks
    OK(download(sum.data(), c, bytes, s));
    EXPECT(differing_sums(sum.data(), n), 0);
    EXPECT(counted("launches"), 1);
    EXPECT(counted("copies"), 3);
    EXPECT(counted("h2d_bytes"), 2 * bytes);
    EXPECT(counted("d2h_bytes"), bytes);
    EXPECT(counted("kernel_read_bytes"), 2 * bytes);
    EXPECT(counted("kernel_written_bytes"), bytes);
    EXPECT(counted("device_bytes"), 3 * bytes);
    EXPECT(counted("host_waits"), 1);  // the copy to pageable memory
    for (Pointer it : {a, b, c}) OK(cu("cuMemFree_v2", it));
    EXPECT(counted("device_bytes"), 0);
    EXPECT(counted("peak_device_bytes"), 3 * bytes);
}
CASE(one_stream_computes, "", nullptr) { one_stream(); }
CASE(one_stream_computes_in_reverse, "STANDIN_REVERSE=1", nullptr) { one_stream(); }
CASE(reverse_order_shows_dependent_threads, "STANDIN_REVERSE=1", nullptr) {
    context_of(0);
    Pointer a = device(48);
    for (unsigned blocks : {1, 2}) {
        uint8_t host[48] = {};
        host[0] = 1, host[16] = 2;
        OK(upload(a, host, 48, nullptr));
        OK(launch("copy_vectors", Vectors{a + 16, a, 2}, nullptr, blocks, 2 / blocks));
        OK(download(host, a, 48, nullptr));
        EXPECT(host[32], 2);  // forwards it would be 1
    }
}

// Orders three streams by events. Data in pinned memory is visible after the wait and not before.
CASE(events_order_streams, "", nullptr) {
    context_of(0);
    const size_t n = 512, bytes = n * 4;
    Pointer a = device(bytes), c = device(bytes);
    uint8_t *source = pinned(bytes), *target = pinned(bytes);
    Handle in = stream(), work = stream(), out = stream();
    for (int step = 0; step < 3; step++) {
        memcpy(source, ramp(n, 0.75).data(), bytes);
        order(in, work);
        OK(upload(a, source, bytes, in));
        order(work, in), order(work, out);
        OK(launch("add", Add{c, a, a, n}, work));
        order(out, work);
        OK(download(target, c, bytes, out));
        Handle done = event_after(out);
        EXPECT(target[7], 0xA5);
        EXPECT(cu("cuEventQuery", done), NOT_READY);
        OK(cu("cuEventQuery", done));
        EXPECT(differing_sums((float*)target, n), 0);
    }
    OK(cu("cuMemFreeHost", (void*)source));
    OK(cu("cuMemFreeHost", (void*)target));
    EXPECT(counted("pinned_bytes"), 0);
    EXPECT(counted("host_waits"), 0);
}

CASE(default_and_blocking_streams_wait_for_each_other, "", nullptr) {
    context_of(0);
    Pointer a = device(64);
    Handle first = stream(0), second = stream(0);
    Handle legacy = nullptr, same = Handle(1), of_thread = Handle(2);
    for (Handle it : {first, legacy, second, same, of_thread, legacy, first}) OK(fill(a, 1, 64, it));
    OK(cu("cuStreamDestroy_v2", first));
    OK(fill(a, 1, 64, nullptr));
    OK(cu("cuMemFree_v2", a));
}
CASE(default_stream_does_not_order_non_blocking_ones, "", "which cuMemsetD8Async on legacy default stream 1 of") {
    context_of(0);
    Pointer a = device(64);
    Handle s = stream();
    OK(fill(a, 1, 64, nullptr));
    EXPECT(fill(a, 1, 64, s), FAILED);
}
CASE(non_blocking_streams_do_not_order_the_default_one, "", "which cuMemsetD8Async on non-blocking stream") {
    context_of(0);
    Pointer a = device(64);
    Handle s = stream();
    OK(fill(a, 1, 64, s));
    EXPECT(fill(a, 1, 64, nullptr), FAILED);
}
CASE(per_thread_streams_are_separate, "", "per-thread default stream") {
    Handle context = context_of(0);
    Pointer a = device(64);
    OK(fill(a, 1, 64, Handle(2)));
    std::thread([=] {
        OK(cu("cuCtxSetCurrent", context));
        EXPECT(fill(a, 2, 64, Handle(2)), FAILED);
    }).join();
}
CASE(write_after_write, "", "copy_missing_wait") {
    fprintf(stderr, "copy_missing_wait\n");
    context_of(0);
    Pointer a = device(100);
    std::vector<char> host(100);
    OK(upload(a, host.data(), 50, stream()));
    OK(upload(a + 50, host.data(), 50, stream()));  // neighbouring bytes do not conflict
    EXPECT(upload(a + 49, host.data(), 2, stream()), FAILED);
    expect_broken(FAILED);
    OK(cu("cuMemFree_v2", a));
}
CASE(read_after_write, "", "reads bytes [0, 64) of device allocation 1 (64 bytes at 0x") {
    context_of(0);
    Pointer a = device(64), b = device(64);
    OK(fill(a, 1, 64, stream()));
    EXPECT(launch("add", Add{b, a, a, 16}, stream()), FAILED);
}
CASE(write_after_read, "", "cuMemsetD8Async on non-blocking stream 3 of device 0 writes bytes [4, 64) of") {
    context_of(0);
    Pointer a = device(256), b = device(256);
    OK(fill(a, 0, 256, nullptr)), OK(cu("cuCtxSynchronize"));
    OK(launch("add", Add{b, a + 4, a + 32, 8}, stream()));
    EXPECT(fill(a + 4, 1, 64, stream()), FAILED);
}
CASE(kernel_then_copy_without_wait, "", "which kernel add on non-blocking stream 2 of device 0 writes") {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    OK(launch("add", Add{a, a, a, 16}, stream()));
    EXPECT(download(host, a, 64, stream()), FAILED);
}
CASE(an_event_covers_only_earlier_work, "", "an event or a wait is missing") {
    context_of(0);
    Pointer a = device(64);
    Handle first = stream(), second = stream(), early = event_after(first);
    OK(fill(a, 1, 64, first));
    OK(cu("cuStreamWaitEvent", second, early, 0u));
    EXPECT(fill(a, 1, 64, second), FAILED);
}
CASE(an_event_covers_no_other_stream, "", "an event or a wait is missing") {
    context_of(0);
    Pointer a = device(64);
    Handle first = stream(), second = stream();
    OK(fill(a, 1, 64, first)), order(second, second);
    EXPECT(fill(a, 1, 64, second), FAILED);
}
CASE(neighbours_do_not_conflict, "", nullptr) {
    context_of(0);
    Pointer a = device(128);
    Handle first = stream(), second = stream();
    for (int i = 0; i < 2; i++) {
        OK(launch("copy_vectors", Vectors{a, a + 16, 1}, first));
        OK(launch("copy_vectors", Vectors{a + 32, a + 48, 5}, second));
    }
}
CASE(a_later_write_keeps_the_rest_of_an_earlier_one, "", "writes bytes [40, 48) of") {
    context_of(0);
    Pointer a = device(64);
    Handle first = stream(), second = stream();
    OK(fill(a, 1, 64, first)), order(second, first);
    OK(fill(a + 16, 2, 16, second));
    EXPECT(fill(a + 40, 3, 8, stream()), FAILED);
}
CASE(a_reader_does_not_replace_the_writer, "", "reads bytes [0, 64) of") {
    context_of(0);
    Pointer a = device(64), b = device(64), c = device(64);
    Handle first = stream(), second = stream();
    OK(fill(a, 1, 64, first)), order(second, first);
    OK(move(b, a, 64, second));
    EXPECT(move(c, a, 64, stream()), FAILED);
}
CASE(readers_do_not_conflict, "", nullptr) {
    context_of(0);
    Pointer a = device(64), b = device(64), c = device(64);
    Handle first = stream(), second = stream();
    OK(fill(a, 1, 64, first)), order(second, first);
    OK(move(b, a, 64, first)), OK(move(c, a, 64, second));
    order(first, second);
    OK(fill(a, 2, 64, first));
}
CASE(a_write_conflicts_with_every_reader, "", "cuMemcpyDtoDAsync on non-blocking stream 2 of device 0 reads") {
    context_of(0);
    Pointer a = device(64), b = device(64), c = device(64);
    Handle first = stream(), second = stream();
    OK(move(b, a, 64, first)), OK(move(c, a, 64, second));
    EXPECT(fill(a, 2, 64, second), FAILED);
}
CASE(a_wait_of_the_host_orders_streams, "", nullptr) {
    context_of(0);
    Pointer a = device(64);
    Handle streams[] = {stream(), stream(), stream(), stream()};
    OK(fill(a, 1, 64, streams[0])), OK(synchronize(streams[0]));
    OK(fill(a, 1, 64, streams[1])), OK(cu("cuCtxSynchronize"));
    OK(fill(a, 1, 64, streams[2])), OK(cu("cuEventSynchronize", event_after(streams[2])));
    OK(fill(a, 1, 64, streams[3]));
    EXPECT(counted("host_waits"), 3);
}
CASE(a_wait_covers_no_other_stream, "", nullptr) {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(128);
    Handle first = stream(), second = stream();
    OK(fill(a, 1, 64, first)), order(second, first);
    OK(download(host, a, 64, first)), OK(download(host + 64, a, 64, second));
    OK(synchronize(first));
    OK(cu("cuStreamQuery", first));  // the host has waited for it
    EXPECT(host[1], 1);
    EXPECT(host[65], 0xA5);
    EXPECT(cu("cuStreamQuery", second), NOT_READY);
}
CASE(freeing_waits_for_the_device, "", nullptr) {
    context_of(0);
    Pointer a = device(64), b = device(64);
    uint8_t* host = pinned(64);
    Handle s = stream();
    OK(fill(a, 1, 64, s)), OK(download(host, a, 64, s));
    OK(cu("cuMemFree_v2", b));
    EXPECT(host[1], 1);
    EXPECT(counted("host_waits"), 1);
}
CASE(a_plain_upload_does_not_order_other_streams, "", "which cuMemcpyHtoD on legacy") {
    context_of(0);
    Pointer a = device(64);
    char host[64] = {};
    OK(cu("cuMemcpyHtoD_v2", a, (const void*)host, (size_t)64));
    EXPECT(fill(a, 1, 64, stream()), FAILED);
}
CASE(a_plain_copy_waits_for_earlier_work, "", nullptr) {
    context_of(0);
    Pointer a = device(64), b = device(64);
    char host[64] = {};
    OK(fill(b, 1, 64, nullptr));
    OK(cu("cuMemcpyHtoD_v2", a, (const void*)host, (size_t)64));
    OK(fill(b, 2, 64, stream()));
}
CASE(plain_copies_are_visible_to_the_host, "", nullptr) {
    context_of(0);
    Pointer a = device(64);
    uint8_t *host = pinned(64), plain[64];
    memset(host, 3, 64);
    OK(cu("cuMemcpyHtoD_v2", a, (const void*)host, (size_t)64));
    memset(host, 4, 64);
    OK(cu("cuMemcpyDtoH_v2", (void*)host, a, (size_t)64));
    EXPECT(host[63], 3);
    OK(download(plain, a, 64, stream()));
    EXPECT(plain[63], 3);
}

CASE(an_early_read_of_the_host_finds_poison, "STANDIN_QUERIES=2", nullptr) {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    Handle s = stream();
    OK(fill(a, 7, 64, s)), OK(download(host, a, 64, s));
    for (int i = 0; i < 2; i++) EXPECT(cu("cuStreamQuery", s), NOT_READY), EXPECT(host[5], 0xA5);
    OK(cu("cuStreamQuery", s));
    EXPECT(host[5], 7);
}
CASE(a_write_of_the_host_under_a_copy_is_found, "", "the host wrote to bytes [0, 64) of pinned allocation") {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    Handle s = stream();
    OK(download(host, a, 64, s));
    host[9] = 1;
    EXPECT(synchronize(s), FAILED);
}
CASE(a_source_changed_under_a_copy_is_found, "", "the host changed bytes [16, 48) of pinned allocation") {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    Handle s = stream();
    OK(upload(a, host + 16, 32, s));
    host[15] = 1, host[48] = 1;
    EXPECT(cu("cuStreamQuery", s), NOT_READY);
    host[20] = 1;
    EXPECT(cu("cuStreamQuery", s), FAILED);
    expect_broken(FAILED);
}
CASE(a_changed_source_is_found_before_a_kernel_overwrites_it, "", "the host changed") {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    Handle s = stream();
    OK(upload(a, host, 32, s));
    host[0] ^= 1;
    EXPECT(launch("add", Add{(Pointer)host, a, a, 8}, s), FAILED);
}
CASE(devices_see_data_that_the_host_does_not, "", nullptr) {
    context_of(0);
    const size_t n = 64, bytes = n * 4;
    Pointer a = device(bytes), b = device(bytes), c = device(bytes);
    uint8_t* host = pinned(3 * bytes);
    Handle s = stream(), other = stream();
    OK(upload(a, ramp(n, 0.25).data(), bytes, s));
    OK(download(host, a, bytes, s));
    OK(upload(b, host, bytes, s));                                                        // a copy back
    OK(launch("add", Add{(Pointer)host + bytes, (Pointer)host, b, n}, s));                // 0.5, in pinned memory
    OK(download(host + 2 * bytes, b, bytes, s));                                          // a neighbour in flight
    OK(launch("add", Add{c, (Pointer)host + bytes, (Pointer)host + bytes, n}, s));        // 1.0
    OK(launch("add", Add{(Pointer)host, (Pointer)host + bytes, c, n}, s));                // 1.5, over the first copy
    for (size_t i = 0; i < 3; i++) EXPECT(host[i * bytes + 11], 0xA5);
    order(other, s);
    OK(move(a, (Pointer)host, bytes, other));
    OK(synchronize(other));
    EXPECT(differing_sums((float*)host, n), 0);
    EXPECT(((float*)host)[2 * n + 5] == 1.25f, true);
}
CASE(a_source_is_compared_as_the_device_saw_it, "", nullptr) {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    Handle s = stream();
    OK(fill(a, 9, 64, s));
    OK(download(host, a, 32, s)), OK(download(host + 32, a, 32, s));
    OK(upload(a, host, 64, s));
    OK(download(host + 32, a, 32, s));
    EXPECT(host[0], 0xA5);
    OK(synchronize(s));
    EXPECT(host[0], 9);
}
CASE(pinned_memory_freed_while_read, "", "while the host has not waited for cuMemcpyHtoDAsync") {
    context_of(0);
    uint8_t* host = pinned(64);
    OK(upload(device(64), host, 64, stream()));
    EXPECT(cu("cuMemFreeHost", (void*)host), FAILED);
    OK(cu("cuMemFreeHost", (void*)host));  // on a broken device, freeing succeeds
}
CASE(pinned_memory_freed_too_early, "", "while the host has not waited for cuMemcpyDtoHAsync") {
    context_of(0);
    Pointer a = device(64);
    uint8_t* host = pinned(64);
    OK(download(host, a, 64, stream()));
    EXPECT(cu("cuMemFreeHost", (void*)host), FAILED);
}

CASE(stream_ordered_memory, "", nullptr) {
    context_of(0);
    Handle s = stream(), other = stream();
    Pointer a, b;
    OK(cu("cuMemAllocAsync", &a, (size_t)64, s));
    OK(cu("cuMemAllocAsync", &b, (size_t)64, s));
    order(other, s);
    OK(fill(a, 1, 64, other)), OK(fill(b, 1, 64, other));
    order(s, other);
    OK(cu("cuMemFreeAsync", a, s));
    OK(synchronize(other));
    OK(cu("cuMemFree_v2", b));
}
CASE(stream_ordered_memory_used_elsewhere, "", "which cuMemAllocAsync on") {
    context_of(0);
    Pointer a;
    OK(cu("cuMemAllocAsync", &a, (size_t)64, stream()));
    EXPECT(fill(a, 1, 64, stream()), FAILED);
}
CASE(stream_ordered_memory_freed_while_used_elsewhere, "", "cuMemFreeAsync on") {
    context_of(0);
    Pointer a = device(64);
    OK(fill(a, 1, 64, stream()));
    EXPECT(cu("cuMemFreeAsync", a, stream()), FAILED);
}
CASE(stream_ordered_memory_freed_without_waiting, "", "while the host has not waited for cuMemsetD8Async") {
    context_of(0);
    Pointer a;
    Handle s = stream();
    OK(cu("cuMemAllocAsync", &a, (size_t)64, s));
    OK(fill(a, 1, 64, s));
    EXPECT(cu("cuMemFree_v2", a), FAILED);
}

CASE(copies_out_of_bounds, "", "end 1 bytes past the end of device allocation 1 (100 bytes") {
    context_of(0);
    Pointer a = device(100), b = device(100);
    char host[200] = {};
    uint8_t* page_locked = pinned(50);
    OK(upload(a + 50, host, 50, nullptr));
    EXPECT(upload(a + 50, host, 51, nullptr), INVALID);
    EXPECT(upload(a - 1, host, 2, nullptr), INVALID);
    EXPECT(upload(a, page_locked, 51, nullptr), INVALID);
    EXPECT(download(host, a + 100, 1, nullptr), INVALID);
    EXPECT(download((void*)b, a, 1, nullptr), INVALID);
    EXPECT(fill(a, 0, 101, nullptr), INVALID);
    EXPECT(move(b, a + 1, 100, nullptr), INVALID);
    EXPECT(move(a, a + 10, 50, nullptr), INVALID);
    EXPECT(cu("cuMemsetD32Async", a + 2, 1u, (size_t)1, Handle(nullptr)), INVALID);
    OK(cu("cuCtxSynchronize"));
}
CASE(a_kernel_reads_out_of_bounds, "", "kernel add reads 4 bytes at 0x") {
    context_of(0);
    Pointer a = device(64), b = device(63);
    EXPECT(launch("add", Add{a, a, b, 16}, nullptr), ADDRESS);
    expect_broken(ADDRESS);
}
CASE(a_kernel_writes_far_out_of_bounds, "", "bytes past the end of device allocation 1 (64 bytes") {
    context_of(0);
    Pointer a = device(64);
    EXPECT(launch("add", Add{a + 8192, a, a, 16}, nullptr), ADDRESS);
}
CASE(use_after_free, "", "which was freed") {
    context_of(0);
    Pointer a = device(64), b = device(64);
    OK(cu("cuMemFree_v2", a));
    EXPECT(fill(a, 0, 64, nullptr), INVALID);
    EXPECT(cu("cuMemFree_v2", a), INVALID);
    EXPECT(cu("cuMemFree_v2", b + 1), INVALID);
    EXPECT(cu("cuMemFreeHost", (void*)b), INVALID);
    EXPECT(launch("add", Add{b, a, a, 16}, nullptr), ADDRESS);
}
CASE(misaligned, "", "reads 16 bytes at 0x") {
    context_of(0);
    Pointer a = device(128), b = device(128);
    OK(launch("copy_vectors", Vectors{b, a, 8}, nullptr));
    EXPECT(launch("copy_vectors", Vectors{b, a + 8, 4}, nullptr), MISALIGNED);
    expect_broken(MISALIGNED);
}
CASE(foreign_device, "", "is on device 0, but the context is that of device 1") {
    context_of(0);
    Pointer a = device(64);
    char host[64] = {};
    Handle s = stream();
    context_of(1);
    Pointer b = device(64);
    EXPECT(upload(a, host, 64, nullptr), INVALID);
    EXPECT(move(b, a, 64, nullptr), INVALID);
    EXPECT(launch("add", Add{b, b, a, 16}, nullptr), INVALID);
    EXPECT(launch("add", Add{b, a, b, 16}, nullptr), INVALID);
    EXPECT(fill(b, 1, 64, s), HANDLE);
    OK(launch("add", Add{b, b, b, 16}, nullptr));
    EXPECT(counted("kernel_written_bytes"), 64);
    OK(cu("cuCtxSynchronize"));
}
CASE(atomics, "", nullptr) {
    context_of(0);
    std::vector<uint32_t> values(5000, 2);
    values[777] = 90, values[1234] = 9, values[4321] = 7;
    Pointer a = device(20000), most = device(4), least = device(8);
    uint32_t found = 0;
    uint64_t index = 0;
    OK(upload(a, values.data(), 20000, nullptr)), OK(fill(most, 0, 4, nullptr)), OK(fill(least, 0xFF, 8, nullptr));
    OK(launch("extremes", Extremes{a, most, least, 5000}, nullptr, 1));
    OK(download(&found, most, 4, nullptr)), OK(download(&index, least, 8, nullptr));
    EXPECT(found, 90);
    EXPECT(index, 1234);
}

CASE(limits, "STANDIN_MEMORY=1000 STANDIN_PINNED=500", nullptr) {
    context_of(0);
    Pointer a = device(600), b;
    size_t free_bytes, total;
    void* host;
    EXPECT(cu("cuMemAlloc_v2", &b, (size_t)401), MEMORY);
    EXPECT(cu("cuMemAlloc_v2", &b, (size_t)-1), MEMORY);
    OK(cu("cuMemGetInfo_v2", &free_bytes, &total));
    EXPECT(free_bytes, 400);
    EXPECT(total, 1000);
    OK(cu("cuMemFree_v2", a));
    OK(cu("cuMemAllocAsync", &b, (size_t)1000, Handle(nullptr)));
    EXPECT(cu("cuMemHostAlloc", &host, (size_t)501, 0u), MEMORY);
    OK(cu("cuMemHostAlloc", &host, (size_t)500, 0u));
    EXPECT(((uint8_t*)host)[499], 0xA7);
    context_of(1);
    device(1000);
    EXPECT(counted("peak_device_bytes"), 2000);
    EXPECT(counted("peak_pinned_bytes"), 500);
}
CASE(an_allocation_fails, "STANDIN_FAIL_ALLOC=2", nullptr) {
    context_of(0);
    Pointer a = device(8);
    EXPECT(cu("cuMemAlloc_v2", &a, (size_t)8), MEMORY);
    device(8);
}
CASE(a_launch_fails, "STANDIN_FAIL_LAUNCH=2", "STANDIN_FAIL_LAUNCH") {
    context_of(0);
    Pointer a = device(64);
    OK(launch("add", Add{a, a, a, 16}, nullptr));
    EXPECT(launch("add", Add{a, a, a, 16}, nullptr), ADDRESS);
    expect_broken(ADDRESS);
}
CASE(a_copy_fails, "STANDIN_FAIL_COPY=1", "STANDIN_FAIL_COPY") {
    context_of(0);
    Pointer a = device(64), b = device(64);
    EXPECT(move(a, b, 64, nullptr), FAILED);
    expect_broken(FAILED);
}
CASE(no_devices, "STANDIN_DEVICES=0", nullptr) { EXPECT(cu("cuInit", 0u), NO_DEVICE); }
CASE(init_fails, "STANDIN_INIT=803", nullptr) { EXPECT(cu("cuInit", 0u), 803); }
CASE(an_older_driver, "STANDIN_DRIVER=12080", nullptr) {
    int version;
    Handle module;
    context_of(0);
    OK(cu("cuDriverGetVersion", &version));
    EXPECT(version, 12080);
    EXPECT(cu("cuModuleLoadData", &module, (const void*)image), PTX);
}
CASE(an_image_for_other_devices, "STANDIN_REJECT_IMAGE=1", nullptr) {
    Handle module;
    context_of(0);
    EXPECT(cu("cuModuleLoadData", &module, (const void*)image), NO_BINARY);
}
CASE(wrong_names_and_handles, "", "there is no kernel subtract") {
    Handle module, function, context;
    Pointer a;
    OK(cu("cuInit", 0u));
    EXPECT(cu("cuMemAlloc_v2", &a, (size_t)8), CONTEXT);
    EXPECT(cu("cuDevicePrimaryCtxRetain", &context, 2), 101);
    context_of(0);
    EXPECT(cu("cuModuleLoadData", &module, (const void*)".version 9.0"), IMAGE);
    OK(cu("cuModuleLoadData", &module, (const void*)image));
    EXPECT(cu("cuModuleGetFunction", &function, module, "subtract"), NOT_FOUND);
    Handle s = stream();
    OK(cu("cuStreamDestroy_v2", s));
    EXPECT(synchronize(s), HANDLE);
    EXPECT(launch("add", Add{}, nullptr, 1, 1025), INVALID);
    EXPECT(launch("add", Add{}, nullptr, 0, 64), INVALID);
}
CASE(devices_and_errors, "STANDIN_CAPABILITY=86", nullptr) {
    char name[32], uuid[2][16];
    const char* text;
    int value = 0;
    context_of(0);
    OK(cu("cuDeviceGetCount", &value)), EXPECT(value, 2);
    OK(cu("cuDeviceGetName", name, 32, 1)), EXPECT(strcmp(name, "Stand-in GPU 1"), 0);
    OK(cu("cuDeviceGetAttribute", &value, 75, 0)), EXPECT(value, 8);
    OK(cu("cuDeviceGetAttribute", &value, 76, 0)), EXPECT(value, 6);
    for (int i : {0, 1}) OK(cu("cuDeviceGetUuid_v2", uuid[i], i));
    EXPECT(memcmp(uuid[0], uuid[1], 16) != 0, true);
    OK(cu("cuGetErrorName", 719, &text)), EXPECT(strcmp(text, "CUDA_ERROR_LAUNCH_FAILED"), 0);
    OK(cu("cuGetErrorString", 2, &text)), EXPECT(strcmp(text, "out of memory"), 0);
}
CASE(elapsed_time, "", "elapsed time needs") {
    context_of(0);
    Handle timed[2];
    float milliseconds = -1;
    for (Handle& it : timed) OK(cu("cuEventCreate", &it, 0u));
    EXPECT(cu("cuEventElapsedTime", &milliseconds, timed[0], timed[1]), HANDLE);
    for (Handle it : timed) OK(fill(device(64), 0, 64, nullptr)), OK(cu("cuEventRecord", it, Handle(nullptr)));
    EXPECT(cu("cuEventElapsedTime_v2", &milliseconds, timed[0], timed[1]), NOT_READY);
    OK(cu("cuEventSynchronize", timed[1]));
    OK(cu("cuEventElapsedTime_v2", &milliseconds, timed[0], timed[1]));
    EXPECT(milliseconds >= 0, true);
}

// Converts every f16 and bf16 value back to itself, and values between two neighbours to the nearer one, or to the even
// one from the middle.
CASE(conversions_to_16_bits, "", nullptr) {
    for (uint32_t bits = 0; bits < 0x7c00; bits++) {
        float here = f16_to_f32((uint16_t)bits), next = bits == 0x7bff ? 65536.0f : f16_to_f32((uint16_t)(bits + 1));
        float middle = (here + next) / 2;
        float below = bits_f32(f32_bits(middle) - 1), above = bits_f32(f32_bits(middle) + 1);
        bool right = f32_to_f16(here) == bits && f32_to_f16(-here) == (bits | 0x8000) && f32_to_f16(below) == bits &&
                     f32_to_f16(middle) == bits + bits % 2 && f32_to_f16(above) == bits + 1;
        if (!right) EXPECT(bits, UINT64_MAX);
    }
    for (uint32_t bits = 0; bits < 0x7f80; bits++) {
        uint32_t middle = bits << 16 | 0x8000;
        float here = bf16_to_f32((uint16_t)bits), below = bits_f32(middle - 1), above = bits_f32(middle + 1);
        bool right = f32_to_bf16(here) == bits && f32_to_bf16(-here) == (bits | 0x8000) && f32_to_bf16(below) == bits &&
                     f32_to_bf16(bits_f32(middle)) == bits + bits % 2 && f32_to_bf16(above) == bits + 1;
        if (!right) EXPECT(bits, UINT64_MAX);
    }
    for (uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xffc00000u, 0xff800001u}) {
        EXPECT(f32_to_f16(bits_f32(nan)), 0x7fff);
        EXPECT(f32_to_bf16(bits_f32(nan)), 0x7fff);
    }
    EXPECT(f32_bits(fma_f32(0x1.000002p0f, 0x1.fffffep-1f, -1.0f)), 0x337ffffe);  // 0 if the product were rounded
    EXPECT(f32_bits(f64_to_f32(0x1.000001p0)), 0x3f800000);
}

// ---- Running

static std::string contents(FILE* file) {
    std::string text;
    rewind(file);
    for (int byte; (byte = fgetc(file)) != EOF;) text += (char)byte;
    return text;
}
static void set_environment(const std::string& settings) {
    for (size_t at = 0; at < settings.size();) {
        size_t end = std::min(settings.find(' ', at), settings.size()), equals = settings.find('=', at);
        setenv(settings.substr(at, equals - at).c_str(), settings.substr(equals + 1, end - equals - 1).c_str(), 1);
        at = end + 1;
    }
}
static int run_case(const Case& it, const char* path) {
    set_environment(it.environment);
    library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return printf("    %s\n", dlerror()), 1;
    it.run();
    fflush(stdout);
    return wrong;
}
static bool passes(const Case& it, const char* path) {
    FILE* messages = tmpfile();
    pid_t child = fork();
    if (child == 0) {
        dup2(fileno(messages), 2);
        _exit(run_case(it, path));
    }
    int status = 0;
    waitpid(child, &status, 0);
    std::string text = contents(messages);
    fclose(messages);
    bool printed = it.message ? text.find(it.message) != std::string::npos : text.empty();
    bool good = WIFEXITED(status) && WEXITSTATUS(status) == 0 && printed;
    if (!good) printf("FAILED %s (status %d); printed:\n%s\n", it.name, status, text.c_str());
    return good;
}

int main(int count, char** arguments) {
    if (count < 2) return fprintf(stderr, "usage: selftest path/to/libcuda.so.1 [part of a name]\n"), 2;
    int run = 0, failed = 0;
    for (const Case& it : cases) {
        if (count > 2 && !strstr(it.name, arguments[2])) continue;
        run++, failed += !passes(it, arguments[1]);
        fflush(stdout);
    }
    printf("%d cases, %d failed\n", run, failed);
    return failed != 0 || run == 0;
}
