// Blends snapshots (sources) into weighted sums (targets), up to 52 sources and 8 targets a launch.
//
//     out[m] = round(sum over k of w[k][m] x[k])
//
// Sums are taken in f64 from the first source to the last and rounded once, as on the CPU. More sources take several
// launches, which keep the sums in memory in between: the order of additions stays the same.
//
// Memory: each source is read once for all targets of a launch, each target written once. Sums that pass between
// launches cost 16 bytes per element and target. If sources and targets are all aligned to 16 bytes, a thread moves
// vectors; otherwise, and at the end, single elements. Weights and addresses are arguments of the kernel.
//
// Tried and rejected:
// - Sums in f32: wrong by many units in the last place if the weights are large and of both signs.
// - Splitting the sources among threads: the order of additions would differ from the CPU's.
// - 8 elements a thread for more than two targets: the f64 sums do not fit the registers.
// - 3 blocks per multiprocessor for 8 targets of 8 elements: 80 registers a thread spill, even with f32 sums.
// - 4 sources of 16 bits or f32 at a time for three and more targets: half as many bytes are in flight, and no block
//   more fits a multiprocessor.
// - Loading the next sources while these are added: spills for one and two targets, and more targets have enough warps.
// - A scan of the dtypes for the end of a run: 6 to 9% of a thread's instructions. The host passes the ends.
// - A kernel for each pair of dtypes: 72 kernels took 48 s to compile. The dtype of each source is an argument instead.
#include "numbers.cuh"

#define SOURCES 52   // with the weights, 3,976 bytes of arguments: CUDA 12.0 allows 4,096
#define TARGETS 8    // their f64 sums take 64 registers of a thread with 4 elements
#define THREADS 256  // as in update.cu

// Most sources that a thread loads before it adds them. A build can set another number, to compare.
#ifndef BLEND_UNROLL
#define BLEND_UNROLL 8
#endif

struct BlendArgs {
    uint64_t sources[SOURCES];
    uint64_t targets[TARGETS];
    double weights[SOURCES * TARGETS];  // [k * M + m]: weight of source k for target m of M
    uint64_t sums;                      // [m * pitch + i]: f64 sum of target m at element i, between launches
    uint64_t pitch;
    uint64_t overflow;                  // [m]: least index at which target m overflows its dtype
    uint64_t elements;
    double limit;                       // largest magnitude that the output dtype holds
    uint32_t runs;                      // number of runs: neighbouring sources of one dtype
    uint32_t output;                    // dtype of the targets, see Kind
    uint32_t first, last;               // 1 in the first launch, 1 in the last
    uint32_t aligned;                   // 1 if all sources and targets are aligned to 16 bytes
    uint8_t ends[SOURCES];              // [r]: first source after run r
    uint8_t kinds[SOURCES];             // [r]: dtype of the sources of run r
};

DEVICE bool fits(double x, double limit) { return x <= limit && x >= -limit; }

// Sources of type T that a thread loads before it adds them: 128 bytes in vectors of V elements.
template <class T, int V> struct Batch {
    static const int MOST = 128 / (V * static_cast<int>(sizeof(typename T::Bits)));
    static const int COUNT = MOST < BLEND_UNROLL ? MOST : BLEND_UNROLL;
};

// Adds sources k to end, all of type T, to the sums of V elements. `at` is the offset of these elements in bytes. U
// sources are loaded before they are added, so that their loads wait together. The last ones go half as many at a time.
template <class T, int M, int V, int U> struct AddSources {
    DEVICE void add(double (&sum)[M][V], const BlendArgs& a, uint32_t k, uint64_t at) {
        Vector<T, V> x[U];
        #pragma unroll
        for (int u = 0; u < U; u++) x[u] = load_vector<T, V>(a.sources[k + u] + at);
        #pragma unroll
        for (int u = 0; u < U; u++) {
            #pragma unroll
            for (int v = 0; v < V; v++) {
                const double value = T::whole(element(x[u], v));
                #pragma unroll
                for (int m = 0; m < M; m++) sum[m][v] = fma_f64(a.weights[(k + u) * M + m], value, sum[m][v]);
            }
        }
    }

    DEVICE void run(double (&sum)[M][V], const BlendArgs& a, uint32_t k, uint32_t end, uint64_t at) {
        for (; k + U <= end; k += U) add(sum, a, k, at);
        if constexpr (U > 1) AddSources<T, M, V, U / 2>::run(sum, a, k, end, at);
    }
};

template <class T, int M, int U> struct AddSources<T, M, 1, U> {
    DEVICE void run(double (&sum)[M][1], const BlendArgs& a, uint32_t k, uint32_t end, uint64_t at) {
        for (; k < end; k++) {
            const double value = T::whole(load(reinterpret_cast<const typename T::Bits*>(a.sources[k] + at)));
            #pragma unroll
            for (int m = 0; m < M; m++) sum[m][0] = fma_f64(a.weights[k * M + m], value, sum[m][0]);
        }
    }
};

// Rounds the sums of V elements from i on, and stores them.
template <class T, int M, int V> struct StoreTargets {
    DEVICE void run(const double (&sum)[M][V], const BlendArgs& a, uint64_t i) {
        #pragma unroll
        for (int m = 0; m < M; m++) {
            Vector<T, V> r;
            #pragma unroll
            for (int v = 0; v < V; v += 2) set_pair(r, v, T::round(sum[m][v]), T::round(sum[m][v + 1]));
            store_vector(a.targets[m] + i * sizeof(typename T::Bits), r);
        }
    }
};

template <class T, int M> struct StoreTargets<T, M, 1> {
    DEVICE void run(const double (&sum)[M][1], const BlendArgs& a, uint64_t i) {
        #pragma unroll
        for (int m = 0; m < M; m++) store(reinterpret_cast<typename T::Bits*>(a.targets[m]) + i, T::round(sum[m][0]));
    }
};

DEVICE double* sum_at(const BlendArgs& a, int m, uint64_t i) {
    return reinterpret_cast<double*>(a.sums) + m * a.pitch + i;
}

template <int M, int V> DEVICE void init_sums(double (&sum)[M][V], const BlendArgs& a, uint64_t i) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int v = 0; v < V; v++) sum[m][v] = a.first ? 0.0 : load(sum_at(a, m, i + v));
}

template <class T, int M, int V>
DEVICE void add_run(double (&sum)[M][V], const BlendArgs& a, uint32_t k, uint32_t end, uint64_t i) {
    AddSources<T, M, V, Batch<T, V>::COUNT>::run(sum, a, k, end, i * sizeof(typename T::Bits));
}

// Adds all sources, run by run.
template <int M, int V> DEVICE void add_all(double (&sum)[M][V], const BlendArgs& a, uint64_t i) {
    uint32_t k = 0;
    for (uint32_t r = 0; r < a.runs; r++) {
        const uint32_t end = a.ends[r];
        switch (a.kinds[r]) {
            case KIND_F32: add_run<F32>(sum, a, k, end, i); break;
            case KIND_F16: add_run<F16>(sum, a, k, end, i); break;
            case KIND_BF16: add_run<BF16>(sum, a, k, end, i); break;
            default: add_run<F64>(sum, a, k, end, i);
        }
        k = end;
    }
}

// Notes the sums that overflow, and stores all of them.
template <int M, int V> DEVICE void write_targets(const double (&sum)[M][V], const BlendArgs& a, uint64_t i) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int v = 0; v < V; v++)
            if (!fits(sum[m][v], a.limit)) atomic_min(reinterpret_cast<uint64_t*>(a.overflow) + m, i + v);
    switch (a.output) {
        case KIND_F32: StoreTargets<F32, M, V>::run(sum, a, i); break;
        case KIND_F16: StoreTargets<F16, M, V>::run(sum, a, i); break;
        case KIND_BF16: StoreTargets<BF16, M, V>::run(sum, a, i); break;
        default: StoreTargets<F64, M, V>::run(sum, a, i);
    }
}

template <int M, int V> DEVICE void blend_elements(const BlendArgs& a, uint64_t i) {
    double sum[M][V];
    init_sums(sum, a, i);
    add_all(sum, a, i);
    if (a.last) {
        write_targets(sum, a, i);
        return;
    }
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int v = 0; v < V; v++) store(sum_at(a, m, i + v), sum[m][v]);
}

template <int M, int V> DEVICE void blend(const BlendArgs& a) {
    const uint64_t i = (static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x) * V;
    if (a.aligned && i + V <= a.elements) {
        blend_elements<M, V>(a, i);
        return;
    }
    for (uint64_t j = i; j < i + V && j < a.elements; j++) blend_elements<M, 1>(a, j);
}

// M targets, V elements a thread. 8 elements for one and two targets: 16-bit sources then move 128 bits at a time. 4
// for more targets, whose sums take more registers. The host computes the grid from the same numbers.
//
// Blocks per multiprocessor: 3 leave 80 registers a thread, enough for up to 4 targets; 2 leave 128.
#define BLEND(M, V) \
    extern "C" __global__ void __launch_bounds__(THREADS, (M) <= 4 ? 3 : 2) \
    blend_##M(const __grid_constant__ BlendArgs a) { blend<M, V>(a); }
BLEND(1, 8)
BLEND(2, 8)
BLEND(3, 4)
BLEND(4, 4)
BLEND(5, 4)
BLEND(6, 4)
BLEND(7, 4)
BLEND(8, 4)

#define BLEND_KERNELS(X) X(blend_1) X(blend_2) X(blend_3) X(blend_4) X(blend_5) X(blend_6) X(blend_7) X(blend_8)

#undef THREADS
