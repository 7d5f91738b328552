// Copies many small tensors into one buffer of the device, from which one copy takes them to the host.
//
//     to[offset + i] = tensor[i], in bytes
//
// Memory: everything is read once and written once, by the widest access that both addresses allow.
//
// Tried and rejected:
// - Writing to the host: it keeps multiprocessors from the training for as long as the bus takes.
// - One block per chunk: starting a block costs more than a small chunk. A few blocks per multiprocessor take turns.
#include "chunk.cuh"

#define THREADS 256  // as in update.cu; registers are far from a limit here (README.md)

struct GatherArgs {
    const Chunk* chunks;
    uint64_t to;
    uint64_t count;  // number of chunks, which a few blocks take in turns
};

extern "C" __global__ void __launch_bounds__(THREADS) gather(const __grid_constant__ GatherArgs a) {
    for (uint64_t i = blockIdx.x; i < a.count; i += gridDim.x) {
        const Chunk c = load_chunk(a.chunks, i);
        copy_bytes(a.to + c.offset, c.address, c.elements, THREADS);
    }
}

#define GATHER_KERNELS(X) X(gather)

#undef THREADS
