// Looks for NaN and infinity in the parameters of an update, before any average changes.
//
//     found = min over the elements p with |p| = infinity or NaN of (chunk, element, kind of value)
//
// An element is found by its bits: without the sign, those of infinity and NaN are the largest. The update kernels do
// nothing if an element was found (update.cu).
//
// Memory: each parameter is read once more, 16 bytes at a time if its tensor is aligned. That is 4 bytes of f32 beside
// the 28 of an update of two compensated profiles, and 2 beside 26 of f16 and bf16. Nothing is written if all is well.
//
// Tried and rejected:
// - The look in the update kernel: blocks would have changed averages before another block finds the NaN.
// - A comparison with the least element in the loop: the place is only needed after something was found.
#include "chunk.cuh"

#define THREADS 256  // as in update.cu; registers are far from a limit here (README.md)

struct LookArgs {
    const Chunk* chunks;  // those of averaged tensors
    uint64_t* found;      // NOTHING_FOUND, or the key of the first element
};

// Bits of infinity.
template <class T> struct Infinity;
template <> struct Infinity<F32> { static const uint32_t BITS = 0x7f800000; };
template <> struct Infinity<F16> { static const uint16_t BITS = 0x7c00; };
template <> struct Infinity<BF16> { static const uint16_t BITS = 0x7f80; };
template <> struct Infinity<F64> { static const uint64_t BITS = static_cast<uint64_t>(0x7ff0) << 48; };

// Returns the bits of an element without its sign.
template <class T> DEVICE typename T::Bits magnitude(typename T::Bits bits) {
    typedef typename T::Bits Bits;
    return static_cast<Bits>(bits & static_cast<Bits>(~(static_cast<uint64_t>(1) << (8 * sizeof(Bits) - 1))));
}

// Reports element i of the block's chunk if it is not finite. Kind of value 0 is NaN, 1 infinity, 2 minus infinity.
template <class T> DEVICE bool report(const LookArgs& a, uint32_t i, typename T::Bits bits) {
    const typename T::Bits size = magnitude<T>(bits);
    if (size < Infinity<T>::BITS) return false;
    const uint32_t kind = size != Infinity<T>::BITS ? 0 : size == bits ? 1 : 2;
    atomic_min(a.found, static_cast<uint64_t>(blockIdx.x) << 32 | (i * 4 + kind));
    return true;
}

template <class T> DEVICE void look_at_chunk(const LookArgs& a, const Chunk& c) {
    typedef typename T::Bits Bits;
    const int V = 16 / sizeof(Bits);
    const uint32_t none = 0xffffffff;
    uint32_t first = none;
    const uint32_t vectors = c.address % 16 == 0 ? c.elements / V : 0;
    for (uint32_t i = threadIdx.x; i < vectors; i += THREADS) {
        const Vector<T, V> p = load_vector<T, V>(c.address + static_cast<uint64_t>(i) * 16);
        bool is_finite = true;
        #pragma unroll
        for (int v = 0; v < V; v++) is_finite &= magnitude<T>(element(p, v)) < Infinity<T>::BITS;
        if (!is_finite && first == none) first = i * V;
    }
    const Bits* elements = reinterpret_cast<const Bits*>(c.address);
    // Later vectors of this thread are behind the one that was found, which has an element to report.
    for (uint32_t i = first; i < vectors * V; i++) {
        if (report<T>(a, i, load(elements + i))) return;
    }
    for (uint32_t i = vectors * V + threadIdx.x; i < c.elements; i += THREADS) {
        if (report<T>(a, i, load(elements + i))) return;
    }
}

DEVICE void look_at(const LookArgs& a) {
    const Chunk c = load_chunk(a.chunks, blockIdx.x);
    switch (c.kind) {
        case KIND_F32: look_at_chunk<F32>(a, c); break;
        case KIND_F16: look_at_chunk<F16>(a, c); break;
        case KIND_BF16: look_at_chunk<BF16>(a, c); break;
        case KIND_F64: look_at_chunk<F64>(a, c);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) look(const __grid_constant__ LookArgs a) { look_at(a); }

// In a CUDA graph: it does not look before an update that is not due. Other blocks may change `found` meanwhile, but
// never from or to NOT_DUE.
extern "C" __global__ void __launch_bounds__(THREADS) look_in_graph(const __grid_constant__ LookArgs a) {
    if (load(a.found) != NOT_DUE) look_at(a);
}

// For a model on several devices: if another device has found an element, this one does not update either.
struct JoinArgs {
    uint64_t* found;            // of this device
    const uint64_t* others[7];  // copies of the others' keys, in host memory
    uint64_t count;
};

extern "C" __global__ void __launch_bounds__(THREADS) join_looks(const __grid_constant__ JoinArgs a) {
    if (threadIdx.x != 0) return;
    #pragma unroll
    for (uint64_t i = 0; i < 7; i++) {
        if (i < a.count && load(a.others[i]) != NOTHING_FOUND) store(a.found, NOT_DUE);
    }
}

#define LOOK_KERNELS(X) X(look) X(look_in_graph) X(join_looks)

#undef THREADS
