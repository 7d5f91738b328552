// Short forms of the driver API, and the list of cases, for selftest.cpp.
#pragma once
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
