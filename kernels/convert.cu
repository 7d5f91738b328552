// What leaves the device: averages in the dtype of a snapshot, their range, and small tensors gathered into one place.
#include "chunk.cuh"

#define THREADS 256

struct ConvertArgs {
    uint64_t high;  // f32
    uint64_t low;   // bf16, or 0 where there are no low-order terms
    uint64_t to;
    uint64_t elements;
    uint32_t output;  // the kind to convert to
    uint32_t aligned; // whether high and to lie at 16 bytes, and low at 8
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

// f64 takes the low-order term along.
DEVICE void convert_whole(const ConvertArgs& a, uint64_t i) {
    const double high = f32_to_f64(bits_f32(load(reinterpret_cast<const uint32_t*>(a.high) + i)));
    const double low = a.low ? f32_to_f64(bf16_to_f32(load(reinterpret_cast<const uint16_t*>(a.low) + i))) : 0.0;
    // Where there is no term, nothing is added: adding 0.0 would turn -0.0 into 0.0.
    store(reinterpret_cast<uint64_t*>(a.to) + i, f64_bits(a.low ? fma_f64(1.0, high, low) : high));
}

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
    const Chunk* chunks;  // `address` is the index of the tensor, `offset` its place in the arena
    const float* high;
    uint32_t* largest;    // of each tensor, the bits of the largest magnitude: infinity and NaN come out on top
};

extern "C" __global__ void __launch_bounds__(THREADS) scan(const __grid_constant__ ScanArgs a) {
    const Chunk c = load_chunk(a.chunks, blockIdx.x);
    const uint64_t from = reinterpret_cast<uint64_t>(a.high + c.offset);
    uint32_t largest = 0;
    // Chunks begin at 16 bytes, as tensors do in an arena.
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
    uint64_t count;  // of chunks: a few blocks take them in turns
};

extern "C" __global__ void __launch_bounds__(THREADS) gather(const __grid_constant__ GatherArgs a) {
    for (uint64_t i = blockIdx.x; i < a.count; i += gridDim.x) {
        const Chunk c = load_chunk(a.chunks, i);
        copy_bytes(a.to + c.offset, c.address, c.elements, THREADS);
    }
}

#define CONVERT_KERNELS(X) X(convert) X(scan) X(gather)

#undef THREADS
