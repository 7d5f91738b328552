// Kernels for the stand-in driver's own tests.
#include "shim.h"

DEVICE uint64_t first_index() { return (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; }
DEVICE uint64_t stride() { return (uint64_t)gridDim.x * blockDim.x; }

struct AddArgs { float *dst; const float *a, *b; uint64_t n; };

// dst = a + b
extern "C" __global__ void add(const __grid_constant__ AddArgs args) {
    for (uint64_t i = first_index(); i < args.n; i += stride())
        store(args.dst + i, add_f32(load(args.a + i), load(args.b + i)));
}

struct VectorArgs { uint4 *dst; const uint4 *src; uint64_t n; };

extern "C" __global__ void copy_vectors(const __grid_constant__ VectorArgs args) {
    for (uint64_t i = first_index(); i < args.n; i += stride())
        store(args.dst + i, load(args.src + i));
}

struct ExtremeArgs { const uint32_t *src; uint32_t *most; uint64_t *least_index; uint64_t n; };

// most = the largest value; least_index = the smallest index of an odd value
extern "C" __global__ void extremes(const __grid_constant__ ExtremeArgs args) {
    for (uint64_t i = threadIdx.x; i < args.n; i += blockDim.x) {
        uint32_t value = load(args.src + i);
        atomic_max(args.most, value);
        if (value & 1) atomic_min(args.least_index, i);
    }
}

#define SELFTEST_KERNELS(X) X(add) X(copy_vectors) X(extremes)
