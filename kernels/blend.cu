// The blend: out[m] = sum_k w[k][m] x[k], up to 64 sources and 8 targets a launch.
//
// Sums are taken in f64, from the first source to the last, and rounded once at the end, as on the CPU. More sources
// than a launch takes go in several, with the sums kept in memory between them, so the order of additions is the same.
#include "numbers.cuh"

#define SOURCES 64
#define TARGETS 8
#define THREADS 256

struct BlendArgs {
    uint64_t sources[SOURCES];
    uint64_t targets[TARGETS];
    double weights[SOURCES * TARGETS];  // of source k for target m of M at [k * M + m]
    uint64_t sums;                      // f64 sums of target m at [m * pitch + i], between launches
    uint64_t pitch;
    uint64_t unfit;                     // for each target, the first element that does not fit: kept at its minimum
    uint64_t elements;
    double limit;                       // the largest magnitude that fits the output type
    uint32_t count;                     // of sources
    uint32_t output;                    // the output's kind
    uint32_t first, last;               // whether this is the first launch, and the last
    uint32_t aligned;                   // whether all sources and targets lie at 16 bytes
    uint8_t kinds[SOURCES];
};

DEVICE bool fits(double x, double limit) { return x <= limit && x >= -limit; }

// Adds sources k to end, all of type T, to the sums of V elements from i on.
template <class T, int M, int V> struct Add {
    static const int U = sizeof(typename T::Bits) == 8 ? 2 : 4;  // sources loaded before they are added

    DEVICE void one(double (&sum)[M][V], const BlendArgs& a, uint32_t k, const Vector<T, V>& x) {
        #pragma unroll
        for (int v = 0; v < V; v++) {
            const double value = T::whole(element(x, v));
            #pragma unroll
            for (int m = 0; m < M; m++) sum[m][v] = fma_f64(a.weights[k * M + m], value, sum[m][v]);
        }
    }

    DEVICE void run(double (&sum)[M][V], const BlendArgs& a, uint32_t k, uint32_t end, uint64_t i) {
        const uint64_t at = i * sizeof(typename T::Bits);
        for (; k + U <= end; k += U) {
            Vector<T, V> x[U];
            #pragma unroll
            for (int u = 0; u < U; u++) x[u] = load_vector<T, V>(a.sources[k + u] + at);
            #pragma unroll
            for (int u = 0; u < U; u++) one(sum, a, k + u, x[u]);
        }
        for (; k < end; k++) one(sum, a, k, load_vector<T, V>(a.sources[k] + at));
    }
};

template <class T, int M> struct Add<T, M, 1> {
    DEVICE void run(double (&sum)[M][1], const BlendArgs& a, uint32_t k, uint32_t end, uint64_t i) {
        for (; k < end; k++) {
            const double value = T::whole(load(reinterpret_cast<const typename T::Bits*>(a.sources[k]) + i));
            #pragma unroll
            for (int m = 0; m < M; m++) sum[m][0] = fma_f64(a.weights[k * M + m], value, sum[m][0]);
        }
    }
};

template <class T, int M, int V> struct Put {
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

template <class T, int M> struct Put<T, M, 1> {
    DEVICE void run(const double (&sum)[M][1], const BlendArgs& a, uint64_t i) {
        #pragma unroll
        for (int m = 0; m < M; m++) store(reinterpret_cast<typename T::Bits*>(a.targets[m]) + i, T::round(sum[m][0]));
    }
};

DEVICE double* sum_at(const BlendArgs& a, int m, uint64_t i) { return reinterpret_cast<double*>(a.sums) + m * a.pitch + i; }

template <int M, int V> DEVICE void start(double (&sum)[M][V], const BlendArgs& a, uint64_t i) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int v = 0; v < V; v++) sum[m][v] = a.first ? 0.0 : load(sum_at(a, m, i + v));
}

// Adds all sources, one run of equal types after the other.
template <int M, int V> DEVICE void add_all(double (&sum)[M][V], const BlendArgs& a, uint64_t i) {
    for (uint32_t k = 0; k < a.count;) {
        const uint8_t kind = a.kinds[k];
        uint32_t end = k + 1;
        while (end < a.count && a.kinds[end] == kind) end++;
        switch (kind) {
            case KIND_F32: Add<F32, M, V>::run(sum, a, k, end, i); break;
            case KIND_F16: Add<F16, M, V>::run(sum, a, k, end, i); break;
            case KIND_BF16: Add<BF16, M, V>::run(sum, a, k, end, i); break;
            default: Add<F64, M, V>::run(sum, a, k, end, i);
        }
        k = end;
    }
}

template <int M, int V> DEVICE void finish(const double (&sum)[M][V], const BlendArgs& a, uint64_t i) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int v = 0; v < V; v++)
            if (!fits(sum[m][v], a.limit)) atomic_min(reinterpret_cast<uint64_t*>(a.unfit) + m, i + v);
    switch (a.output) {
        case KIND_F32: Put<F32, M, V>::run(sum, a, i); break;
        case KIND_F16: Put<F16, M, V>::run(sum, a, i); break;
        case KIND_BF16: Put<BF16, M, V>::run(sum, a, i); break;
        default: Put<F64, M, V>::run(sum, a, i);
    }
}

template <int M, int V> DEVICE void blend_elements(const BlendArgs& a, uint64_t i) {
    double sum[M][V];
    start(sum, a, i);
    add_all(sum, a, i);
    if (a.last) {
        finish(sum, a, i);
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

// Elements that a thread takes at a time: 8 for few targets, so that 16-bit sources are read 16 bytes at a time; 4 for
// many, whose sums would not fit the registers. The host computes the grid from the same numbers.
#define BLEND(M, V) \
    extern "C" __global__ void __launch_bounds__(THREADS, (M) <= 4 ? 3 : 2) blend_##M(const __grid_constant__ BlendArgs a) { blend<M, V>(a); }
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
