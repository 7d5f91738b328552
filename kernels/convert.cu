// Prepares data for the host: averages in the dtype of a snapshot, their value ranges, small tensors in one buffer.
//
//     convert:  out = round(high), and high + low if the output is f64
//     scan:     largest[t] = max over the elements of tensor t of |high|
//     gather:   to[offset + i] = tensor[i], in bytes
//
// Memory: everything is read once and written once. convert and scan move f32 128 bits at a time; gather uses the
// widest access that both addresses allow.
//
// Tried and rejected:
// - One block per chunk in gather: it reaches the host over the bus, which few blocks fill. More would only keep
//   multiprocessors from the training that runs beside it.
#include "chunk.cuh"

#define THREADS 256  // as in update.cu; registers are far from a limit here (README.md)

struct ConvertArgs {
    uint64_t high;  // f32 averages
    uint64_t low;   // low-order terms (Term); 0 if there are none
    uint64_t to;
    uint64_t elements;
    uint32_t output;   // dtype to convert to, see Kind
    uint32_t aligned;  // 1 if high and to are aligned to 16 bytes, and low to 8
};

template <class T> DEVICE void convert_four(const ConvertArgs& a, uint64_t i) {
    const Vector<F32, 4> high = load_vector<F32, 4>(a.high + i * 4);
    Vector<T, 4> r;
    #pragma unroll
    for (int v = 0; v < 4; v += 2) {
        set_pair(r, v, T::round_single(bits_f32(element(high, v))), T::round_single(bits_f32(element(high, v + 1))));
    }
    store_vector(a.to + i * sizeof(typename T::Bits), r);
}

template <class T> DEVICE void convert_one(const ConvertArgs& a, uint64_t i) {
    const float high = bits_f32(load(reinterpret_cast<const uint32_t*>(a.high) + i));
    store(reinterpret_cast<typename T::Bits*>(a.to) + i, T::round_single(high));
}

// Converts one element to f64, which has room for the low-order term.
DEVICE void convert_whole(const ConvertArgs& a, uint64_t i) {
    const float value = bits_f32(load(reinterpret_cast<const uint32_t*>(a.high) + i));
    const double high = f32_to_f64(value);
    const uint16_t* terms = reinterpret_cast<const uint16_t*>(a.low);
    const double low = terms ? f32_to_f64(Term::decode(value, load(terms + i))) : 0.0;
    // A missing term is not added as 0.0, which would turn -0.0 into 0.0.
    store(reinterpret_cast<uint64_t*>(a.to) + i, f64_bits(a.low ? fma_f64(1.0, high, low) : high));
}

// Converts the 4 elements of a thread: 16 bytes of f32, the widest access.
template <class T> DEVICE void convert_stretch(const ConvertArgs& a, uint64_t i) {
    if (a.aligned && i + 4 <= a.elements) {
        convert_four<T>(a, i);
        return;
    }
    for (uint64_t j = i; j < i + 4 && j < a.elements; j++) convert_one<T>(a, j);
}

extern "C" __global__ void __launch_bounds__(THREADS) convert(const __grid_constant__ ConvertArgs a) {
    const uint64_t i = (static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x) * 4;
    switch (a.output) {
        case KIND_F32: convert_stretch<F32>(a, i); break;
        case KIND_F16: convert_stretch<F16>(a, i); break;
        case KIND_BF16: convert_stretch<BF16>(a, i); break;
        default:
            for (uint64_t j = i; j < i + 4 && j < a.elements; j++) convert_whole(a, j);
    }
}

struct ScanArgs {
    const Chunk* chunks;  // `address` is the index of the tensor, `offset` its first element in the arena
    const float* high;
    uint32_t* largest;    // bits of each tensor's largest magnitude; infinity and NaN are above all numbers
};

extern "C" __global__ void __launch_bounds__(THREADS) scan(const __grid_constant__ ScanArgs a) {
    const Chunk c = load_chunk(a.chunks, blockIdx.x);
    const uint64_t from = reinterpret_cast<uint64_t>(a.high + c.offset);
    uint32_t largest = 0;
    // Chunks start at multiples of 16 bytes, as tensors do in an arena.
    for (uint32_t i = threadIdx.x; i < c.elements / 4; i += THREADS) {
        const Vector<F32, 4> x = load_vector<F32, 4>(from + static_cast<uint64_t>(i) * 16);
        #pragma unroll
        for (int v = 0; v < 4; v++) {
            const uint32_t magnitude = element(x, v) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
    }
    const uint32_t rest = c.elements / 4 * 4 + threadIdx.x;
    if (rest < c.elements) {
        const uint32_t magnitude = load(reinterpret_cast<const uint32_t*>(from) + rest) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest > 0) atomic_max(a.largest + c.address, largest);
}

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

#define CONVERT_KERNELS(X) X(convert) X(scan) X(gather)

#undef THREADS
