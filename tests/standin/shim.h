// Shim for compiling the kernels with g++: CUDA's keywords and vectors, and memory accesses that the driver checks.
#pragma once
#include "access.h"
#include "arithmetic.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define DEVICE static inline

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };

struct standin_index { unsigned x, y, z; };
static thread_local standin_index threadIdx, blockIdx, blockDim, gridDim;

template <class T> static inline T load(const T* pointer) {
    standin::touch(pointer, sizeof(T), alignof(T), standin::reads);
    T value;
    memcpy(&value, pointer, sizeof value);
    return value;
}
template <class T> static inline void store(T* pointer, T value) {
    standin::touch(pointer, sizeof(T), alignof(T), standin::writes);
    memcpy(pointer, &value, sizeof value);
}

// Atomics count as writes: within a launch they do not conflict, in two unordered launches they do.
template <class T, class Choose> static inline T standin_atomic(T* pointer, Choose choose) {
    standin::touch(pointer, sizeof(T), alignof(T), standin::writes);
    T before = *pointer;
    *pointer = choose(before);
    return before;
}
static inline uint32_t atomic_max(uint32_t* pointer, uint32_t value) {
    return standin_atomic(pointer, [=](uint32_t before) { return before > value ? before : value; });
}
static inline uint64_t atomic_min(uint64_t* pointer, uint64_t value) {
    return standin_atomic(pointer, [=](uint64_t before) { return before < value ? before : value; });
}
