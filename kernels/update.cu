// Updates the running averages of up to 8 profiles in one pass over the parameters, all tensors in one launch.
//
//     plain:        e' = fma(w, p - e, e)
//     compensated:  d = fma(w, p - e, c);  s = e + d;  c' = round(d - (s - e));  e' = s
//
// p is a parameter, e its f32 average, c the average's low-order term, and w = 1 - beta. Terms are stored in 16 bits
// and rounded by a threshold of the update (Term).
//
// Memory: each parameter is read once; each average is read and written once. For P profiles that is 8 P bytes beside
// the parameter, and 4 P more if the averages are compensated. A block works on one chunk. The averages of a profile
// are in one arena. All arenas have the same layout, in which tensors start at multiples of 16 bytes, so averages move
// 128 bits at a time whatever the alignment of the parameters.
//
// Tried and rejected:
// - One pass per profile reads the parameters P times: 80 instead of 66 bytes for 8 plain profiles of a bf16 parameter.
// - Peeling elements off the front until the streams are aligned: P + 1 streams of different alignment never all are.
// - 8 elements a thread: neighbouring threads would read vectors 32 bytes apart, so a request would use half of each
//   sector. It also takes more registers.
// - All profiles of a thread at once: 8 compensated ones spill 280 bytes at 64 registers.
// - Groups of 2 compensated profiles of 8, in 3 blocks: 36 KB in flight per multiprocessor instead of 48.
// - Leaving the order of loads and stores to the compiler: averages may alias, so it moves no load before a store.
// - A grid-stride loop: not needed, since the host chooses how many chunks there are.
#include "chunk.cuh"

struct UpdateArgs {
    const Chunk* chunks;
    float* high[8];     // f32 part of each profile's averages
    uint16_t* low[8];   // low-order terms (Term), if compensated
    float weights[8];   // 1 - beta of each profile
    uint8_t* copies;    // tensors that are copied, not averaged
    const uint64_t* found;  // what look.cu has found in the parameters
    uint32_t threshold;     // rounds the low-order terms
};

#define THREADS 256  // 4 blocks of 64 registers a thread fill the 65,536 registers of a multiprocessor
#define V 4          // elements a thread takes at a time: 16 bytes of f32, the widest access

// Updates one average by the equation above.
template <bool COMPENSATED> DEVICE void step(float p, float w, uint32_t threshold, float& e, uint16_t& term) {
    if (!COMPENSATED) {
        e = fma_f32(w, sub_f32(p, e), e);
        return;
    }
    const float d = fma_f32(w, sub_f32(p, e), Term::decode(e, term)), s = add_f32(e, d);
    term = Term::encode(s, sub_f32(d, sub_f32(s, e)), threshold);
    e = s;
}

// Groups of profiles, of similar size. A thread holds the averages of one group: MOST profiles, more would spill.
template <int PROFILES, bool COMPENSATED> struct Groups {
    static const int MOST = !COMPENSATED ? 5 : PROFILES < 7 ? 3 : 4;
    static const int COUNT = (PROFILES + MOST - 1) / MOST;
};

// Most vectors of each average that a thread loads before it computes. A build can set another number, to compare.
#ifndef UPDATE_UNROLL
#define UPDATE_UNROLL 4
#endif

// Vectors of each average that a thread loads before it computes: enough loads in flight to hide the memory's latency.
// Fewer profiles need more vectors. Compiled, but not timed yet.
template <int PROFILES, bool COMPENSATED> struct Unroll {
    static const int MOST = PROFILES == 1 && !COMPENSATED ? 4 : PROFILES + COMPENSATED <= 3 ? 2 : 1;
    static const int COUNT = MOST < UPDATE_UNROLL ? MOST : UPDATE_UNROLL;
};

DEVICE uint64_t address_of(const void* base, uint64_t offset, uint64_t size) {
    return reinterpret_cast<uint64_t>(base) + offset * size;
}

// Updates the profiles from those of a group on, a group at a time.
template <class T, int GROUP, int PROFILES, bool COMPENSATED, int U> struct Profiles {
    DEVICE void run(const UpdateArgs& a, uint64_t offset, uint32_t stride, const Vector<T, V>* p) {
        const int GROUPS = Groups<PROFILES, COMPENSATED>::COUNT;
        const int FIRST = PROFILES * GROUP / GROUPS, N = PROFILES * (GROUP + 1) / GROUPS - FIRST;
        Vector<F32, V> high[U][N];
        Vector<Term, V> low[U][COMPENSATED ? N : 1];
        // All loads come before all stores: the compiler cannot know that averages do not alias.
        #pragma unroll
        for (int u = 0; u < U; u++) {
            const uint64_t at = offset + static_cast<uint64_t>(u) * stride * V;
            #pragma unroll
            for (int j = 0; j < N; j++) {
                high[u][j] = load_vector<F32, V>(address_of(a.high[FIRST + j], at, 4));
                if (COMPENSATED) low[u][j] = load_vector<Term, V>(address_of(a.low[FIRST + j], at, 2));
            }
        }
        #pragma unroll
        for (int u = 0; u < U; u++) {
            const uint64_t at = offset + static_cast<uint64_t>(u) * stride * V;
            #pragma unroll
            for (int j = 0; j < N; j++) {
                update_vector(a.weights[FIRST + j], a.threshold, p[u], high[u][j], low[u][COMPENSATED ? j : 0]);
                store_vector(address_of(a.high[FIRST + j], at, 4), high[u][j]);
                if (COMPENSATED) store_vector(address_of(a.low[FIRST + j], at, 2), low[u][j]);
            }
        }
        const int NEXT = GROUP + 1;
        if constexpr (NEXT < GROUPS) Profiles<T, NEXT, PROFILES, COMPENSATED, U>::run(a, offset, stride, p);
    }

    DEVICE void update_vector(float w, uint32_t threshold, const Vector<T, V>& p, Vector<F32, V>& high,
                              Vector<Term, V>& low) {
        #pragma unroll
        for (int i = 0; i < V; i += 2) {
            float e0 = bits_f32(element(high, i)), e1 = bits_f32(element(high, i + 1));
            uint16_t c0 = COMPENSATED ? element(low, i) : 0, c1 = COMPENSATED ? element(low, i + 1) : 0;
            step<COMPENSATED>(T::single(element(p, i)), w, threshold, e0, c0);
            step<COMPENSATED>(T::single(element(p, i + 1)), w, threshold, e1, c1);
            set_pair(high, i, f32_bits(e0), f32_bits(e1));
            if (COMPENSATED) set_pair(low, i, c0, c1);
        }
    }
};

// Updates U vectors of a thread, THREADS vectors apart, from vector i of the chunk on.
template <class T, int PROFILES, bool COMPENSATED, int U, bool ALIGNED>
DEVICE void update_vectors(const UpdateArgs& a, const Chunk& c, uint32_t i) {
    Vector<T, V> p[U];
    #pragma unroll
    for (int u = 0; u < U; u++) {
        const uint64_t at = c.address + static_cast<uint64_t>(i + u * THREADS) * V * sizeof(typename T::Bits);
        p[u] = ALIGNED ? load_vector<T, V>(at) : load_elements<T, V>(at);
    }
    Profiles<T, 0, PROFILES, COMPENSATED, U>::run(a, c.offset + static_cast<uint64_t>(i) * V, THREADS, p);
}

// Updates all whole vectors of a chunk.
template <class T, int PROFILES, bool COMPENSATED, int U, bool ALIGNED>
DEVICE void update_whole(const UpdateArgs& a, const Chunk& c) {
    const uint32_t vectors = c.elements / V;
    uint32_t i = threadIdx.x;
    for (; i + (U - 1) * THREADS < vectors; i += U * THREADS)
        update_vectors<T, PROFILES, COMPENSATED, U, ALIGNED>(a, c, i);
    if (U > 1) {
        for (; i < vectors; i += THREADS) update_vectors<T, PROFILES, COMPENSATED, 1, ALIGNED>(a, c, i);
    }
}

// Updates the elements after the last whole vector, at most V - 1.
template <class T, int PROFILES, bool COMPENSATED> DEVICE void update_rest(const UpdateArgs& a, const Chunk& c) {
    const uint32_t i = c.elements / V * V + threadIdx.x;
    if (i >= c.elements) return;
    const float p = T::single(load(reinterpret_cast<const typename T::Bits*>(c.address) + i));
    for (int j = 0; j < PROFILES; j++) {
        uint32_t* high = reinterpret_cast<uint32_t*>(a.high[j]) + c.offset + i;
        uint16_t* low = a.low[j] + c.offset + i;
        float e = bits_f32(load(high));
        uint16_t term = COMPENSATED ? load(low) : 0;
        step<COMPENSATED>(p, a.weights[j], a.threshold, e, term);
        store(high, f32_bits(e));
        if (COMPENSATED) store(low, term);
    }
}

template <class T, int PROFILES, bool COMPENSATED> DEVICE void update_chunk(const UpdateArgs& a, const Chunk& c) {
    const int U = Unroll<PROFILES, COMPENSATED>::COUNT;
    if (c.address % Alignment<T, V>::BYTES == 0) {
        update_whole<T, PROFILES, COMPENSATED, U, true>(a, c);
    } else {
        update_whole<T, PROFILES, COMPENSATED, 1, false>(a, c);
    }
    update_rest<T, PROFILES, COMPENSATED>(a, c);
}

template <int PROFILES, bool COMPENSATED> DEVICE void update(const UpdateArgs& a) {
    const Chunk c = load_chunk(a.chunks, blockIdx.x);
    // An update with NaN changes nothing. Every block reads the same 8 bytes.
    if (load(a.found) != NOTHING_FOUND) return;
    switch (c.kind) {
        case KIND_F32: update_chunk<F32, PROFILES, COMPENSATED>(a, c); break;
        case KIND_F16: update_chunk<F16, PROFILES, COMPENSATED>(a, c); break;
        case KIND_BF16: update_chunk<BF16, PROFILES, COMPENSATED>(a, c); break;
        // f64 parameters are rare: the path for any alignment is enough.
        case KIND_F64:
            update_whole<F64, PROFILES, COMPENSATED, 1, false>(a, c);
            update_rest<F64, PROFILES, COMPENSATED>(a, c);
            break;
        default: copy_bytes(address_of(a.copies, c.offset, 1), c.address, c.elements, THREADS);
    }
}

// Blocks per multiprocessor that the registers must allow: 4 leave 64 registers a thread, 3 leave 80, 2 leave 128.
// Compensated averages of 5 and 6 profiles need 80, of 7 and 8 up to 128: a thread then keeps 4 of them in flight.
#define BLOCKS(PROFILES, COMPENSATED) (!(COMPENSATED) || (PROFILES) < 5 ? 4 : (PROFILES) < 7 ? 3 : 2)
#define UPDATE(PROFILES, name, COMPENSATED) \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS(PROFILES, COMPENSATED)) \
    update_##name##_##PROFILES(const __grid_constant__ UpdateArgs a) { \
        update<PROFILES, COMPENSATED>(a); \
    }
#define UPDATE_ALL(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#define UPDATE_BOTH(PROFILES) UPDATE(PROFILES, plain, false) UPDATE(PROFILES, compensated, true)
UPDATE_ALL(UPDATE_BOTH)

// Update in a CUDA graph, of up to 4 profiles. Their weights and the threshold are in memory (replay.cu), and then in
// registers, of which 3 blocks leave enough.
struct GraphUpdateArgs {
    UpdateArgs update;
    const float* weights;
    const uint64_t* threshold;
};

template <int PROFILES, bool COMPENSATED> DEVICE void update_in_graph(const GraphUpdateArgs& a) {
    UpdateArgs update_args = a.update;
    #pragma unroll
    for (int j = 0; j < PROFILES; j++) update_args.weights[j] = load(a.weights + j);
    update_args.threshold = static_cast<uint32_t>(load(a.threshold));
    update<PROFILES, COMPENSATED>(update_args);
}

#define UPDATE_GRAPH(PROFILES, name, COMPENSATED) \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) \
    graph_##name##_##PROFILES(const __grid_constant__ GraphUpdateArgs a) { \
        update_in_graph<PROFILES, COMPENSATED>(a); \
    }
#define UPDATE_GRAPHS(PROFILES) UPDATE_GRAPH(PROFILES, plain, false) UPDATE_GRAPH(PROFILES, compensated, true)
UPDATE_GRAPHS(1) UPDATE_GRAPHS(2) UPDATE_GRAPHS(3) UPDATE_GRAPHS(4)

// Names of all kernels, for the stand-in driver.
#define UPDATE_KERNELS(X) \
    X(update_plain_1) X(update_plain_2) X(update_plain_3) X(update_plain_4) \
    X(update_plain_5) X(update_plain_6) X(update_plain_7) X(update_plain_8) \
    X(update_compensated_1) X(update_compensated_2) X(update_compensated_3) X(update_compensated_4) \
    X(update_compensated_5) X(update_compensated_6) X(update_compensated_7) X(update_compensated_8) \
    X(graph_plain_1) X(graph_plain_2) X(graph_plain_3) X(graph_plain_4) \
    X(graph_compensated_1) X(graph_compensated_2) X(graph_compensated_3) X(graph_compensated_4)

#undef V
#undef THREADS
