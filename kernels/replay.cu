// Begins and ends an update in a CUDA graph. One thread does it.
//
// prepare_replay: before a replay with an update, outside of the graph. Its arguments are copied at the launch, so that
//                 any number of replays may be in flight.
// end_replay:     last in the graph. The next replay is without an update, unless one is prepared again.
//
// Memory: some tens of bytes. The host reads the outcome in its own memory.
#include "chunk.cuh"

#define THREADS 256  // as in update.cu; all but one end at once

// State of the updates in graphs. A graph has fixed arguments, so its kernels read here what changes.
struct Replay {
    uint64_t found;   // NOT_DUE, or what look.cu has found since the update was prepared
    uint64_t ticket;  // number of the newest update that was prepared
    uint64_t runs;    // updates in graphs that have run, due or not
    uint64_t threshold;  // of the update, and after it the weight of each profile
};

struct PrepareArgs {
    Replay* replay;
    float* weights;  // of the profiles of this launch
    uint64_t ticket;
    uint64_t found;  // NOTHING_FOUND, or NOT_DUE to take the preparation back
    uint32_t threshold;
    uint32_t count;
    float values[8];
};

// Outcome of the newest replay with an update.
struct Outcome {
    uint64_t ticket;
    uint64_t found;
    uint64_t runs;      // Replay::runs after that replay
    uint64_t all_runs;  // Replay::runs after any replay
};

struct EndArgs {
    Replay* replay;
    Outcome* outcome;
};

extern "C" __global__ void __launch_bounds__(THREADS) prepare_replay(const __grid_constant__ PrepareArgs a) {
    if (threadIdx.x != 0) return;
    #pragma unroll
    for (uint32_t i = 0; i < 8; i++) {
        if (i < a.count) store(a.weights + i, a.values[i]);
    }
    store(&a.replay->threshold, static_cast<uint64_t>(a.threshold));
    store(&a.replay->ticket, a.ticket);
    store(&a.replay->found, a.found);
}

extern "C" __global__ void __launch_bounds__(THREADS) end_replay(const __grid_constant__ EndArgs a) {
    if (threadIdx.x != 0) return;
    const uint64_t runs = load(&a.replay->runs) + 1, found = load(&a.replay->found);
    store(&a.replay->runs, runs);
    store(&a.outcome->all_runs, runs);
    if (found == NOT_DUE) return;
    store(&a.outcome->ticket, load(&a.replay->ticket));
    store(&a.outcome->found, found);
    store(&a.outcome->runs, runs);
    store(&a.replay->found, NOT_DUE);
}

#define REPLAY_KERNELS(X) X(prepare_replay) X(end_replay)

#undef THREADS
