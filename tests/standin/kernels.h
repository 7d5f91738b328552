// Kernels by name. A launch runs its threads one after another.
#pragma once
#include <map>
#include <string>

#include "shim.h"

#ifdef STANDIN_SELFTEST
#include "selftest.cu"
#define STANDIN_KERNELS(X) SELFTEST_KERNELS(X)
#else
#include "update.cu"
#include "look.cu"
#include "blend.cu"
#include "gather.cu"
#include "replay.cu"
#define STANDIN_KERNELS(X) UPDATE_KERNELS(X) LOOK_KERNELS(X) BLEND_KERNELS(X) GATHER_KERNELS(X) \
    REPLAY_KERNELS(X)
#endif

namespace standin {

typedef void (*Runner)(const void* arguments, bool reverse);

static inline uint64_t volume(const standin_index& extent) { return (uint64_t)extent.x * extent.y * extent.z; }
static inline standin_index position(uint64_t number, const standin_index& extent) {
    uint64_t row = number / extent.x;
    return {(unsigned)(number % extent.x), (unsigned)(row % extent.y), (unsigned)(row / extent.y)};
}

// Runs all threads of a launch. Their order must not matter; `reverse` shows if it does.
template <class Arguments, void (*kernel)(Arguments)> static void run(const void* arguments, bool reverse) {
    const Arguments& values = *(const Arguments*)arguments;
    uint64_t blocks = volume(gridDim), threads = volume(blockDim);
    for (uint64_t block = 0; block < blocks; block++) {
        blockIdx = position(reverse ? blocks - 1 - block : block, gridDim);
        for (uint64_t thread = 0; thread < threads; thread++) {
            threadIdx = position(reverse ? threads - 1 - thread : thread, blockDim);
            kernel(values);
        }
    }
}
template <class Arguments> static Arguments argument_of(void (*)(Arguments));

struct Kernel { Runner run; size_t bytes; };  // bytes of its arguments
template <class Arguments> static size_t bytes_of(void (*)(Arguments)) { return sizeof(Arguments); }

static inline Kernel kernel_named(const std::string& name) {
#define STANDIN_ENTRY(kernel) {#kernel, {run<decltype(argument_of(kernel)), kernel>, bytes_of(kernel)}},
    static const auto* all = new std::map<std::string, Kernel>{STANDIN_KERNELS(STANDIN_ENTRY)};
    auto at = all->find(name);
    return at == all->end() ? Kernel{nullptr, 0} : at->second;
}

}  // namespace standin
