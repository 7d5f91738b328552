// Element types and their arithmetic: the numeric contract with the CPU code, which computes the same bits.
//
//     a * b + c, a + b, a - b, a * b: each rounded once, to nearest even
//
// Every operation is a named intrinsic, which no compiler contracts or reorders. Only the payload of a NaN may differ
// from the CPU's, and the low-order term of an average that is not finite.
//
// Memory: every element is read once and written once. Loads and stores are streaming ones, which leave the caches to
// other work. Vectors move 128 bits at a time, or 64 if they are that short.
//
// Kernels use no shared memory, barriers or warp intrinsics. The same files therefore compile as plain C++ (shim.h) and
// run under the stand-in driver of the tests.
//
// Tried and rejected:
// - Plain dereferences: through a pointer made from an integer they compile to the generic `LD`, not to `LDG`.
// - NVIDIA's headers in the C++ build: g++ compiles the conversions, but `__fmaf_rn` and `__ldcs` do not exist there.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE static __device__ __forceinline__

template <class T> DEVICE T load(const T* p) { return __ldcs(p); }
template <class T> DEVICE void store(T* p, T value) { __stcs(p, value); }
DEVICE void atomic_min(uint64_t* p, uint64_t value) { atomicMin(reinterpret_cast<unsigned long long*>(p), value); }

DEVICE float bits_f32(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t f32_bits(float value) { return __float_as_uint(value); }
DEVICE double bits_f64(uint64_t bits) { return __longlong_as_double(bits); }
DEVICE uint64_t f64_bits(double value) { return __double_as_longlong(value); }

DEVICE float fma_f32(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float add_f32(float a, float b) { return __fadd_rn(a, b); }
DEVICE float sub_f32(float a, float b) { return __fsub_rn(a, b); }
DEVICE float mul_f32(float a, float b) { return __fmul_rn(a, b); }
DEVICE double fma_f64(double a, double b, double c) { return __fma_rn(a, b, c); }

DEVICE double f32_to_f64(float value) { return value; }
DEVICE float f64_to_f32(double value) { return __double2float_rn(value); }
DEVICE float f16_to_f32(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DEVICE uint16_t f32_to_f16(float value) { return __half_as_ushort(__float2half_rn(value)); }
DEVICE float bf16_to_f32(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
DEVICE uint16_t f32_to_bf16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
#else
#include "shim.h"
#endif

// Numbers of the element types; the host uses the same.
enum Kind : uint32_t { KIND_F32 = 0, KIND_F16 = 1, KIND_BF16 = 2, KIND_F64 = 3, KIND_BYTES = 4 };

// Each type has `single` and `whole`, which widen an element to f32 and f64, and `round`, which rounds an f64 to
// it. f16 and bf16 go through f32 in both directions.
struct F32 {
    typedef uint32_t Bits;
    DEVICE float single(uint32_t bits) { return bits_f32(bits); }
    DEVICE double whole(uint32_t bits) { return f32_to_f64(bits_f32(bits)); }
    DEVICE uint32_t round(double value) { return f32_bits(f64_to_f32(value)); }
};

struct F16 {
    typedef uint16_t Bits;
    DEVICE float single(uint16_t bits) { return f16_to_f32(bits); }
    DEVICE double whole(uint16_t bits) { return f32_to_f64(f16_to_f32(bits)); }
    DEVICE uint16_t round(double value) { return f32_to_f16(f64_to_f32(value)); }
};

struct BF16 {
    typedef uint16_t Bits;
    DEVICE float single(uint16_t bits) { return bf16_to_f32(bits); }
    DEVICE double whole(uint16_t bits) { return f32_to_f64(bf16_to_f32(bits)); }
    DEVICE uint16_t round(double value) { return f32_to_bf16(f64_to_f32(value)); }
};

struct F64 {
    typedef uint64_t Bits;
    DEVICE float single(uint64_t bits) { return f64_to_f32(bits_f64(bits)); }
    DEVICE double whole(uint64_t bits) { return bits_f64(bits); }
    DEVICE uint64_t round(double value) { return f64_bits(value); }
};

// Low-order term of an average, an integer in units of 2^-14 ulp. src/compute/cpu/low_order.rs has the derivation.
struct Term {
    typedef uint16_t Bits;
    // Returns 1.5 2^E, for a value whose exponent is E. Its neighbours are an ulp of the value away.
    DEVICE uint32_t anchor(float value) { return (f32_bits(value) & 0x7f800000) | 0x00400000; }
    // Returns the remainder that the term of a value stands for.
    DEVICE float decode(float value, uint16_t bits) {
        const uint32_t a = anchor(value);
        const float sum = bits_f32(a + static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(bits))));
        return mul_f32(sub_f32(sum, bits_f32(a)), 0x1p-14f);
    }
    // Returns the term of a remainder, rounded down from `threshold` 64ths of a unit above it.
    DEVICE uint16_t encode(float value, float remainder, uint32_t threshold) {
        const float sum = fma_f32(remainder, 0x1p20f, bits_f32(anchor(value)));
        return static_cast<uint16_t>((f32_bits(sum) + threshold) >> 6);
    }
};

// V consecutive elements of type T as 32-bit words.
template <class T, int V> struct Vector {
    static const int WORDS = V * static_cast<int>(sizeof(typename T::Bits)) / 4;
    uint32_t words[WORDS];
};

// Alignment in bytes that load_vector and store_vector require: 16, or the size of a smaller vector.
template <class T, int V> struct Alignment {
    static const uint64_t BYTES = Vector<T, V>::WORDS % 4 == 0 ? 16 : 8;
};

template <class T, int V> DEVICE Vector<T, V> load_vector(uint64_t address) {
    Vector<T, V> r;
    if (Vector<T, V>::WORDS % 4 == 0) {
        #pragma unroll
        for (int i = 0; i < Vector<T, V>::WORDS / 4; i++) {
            const uint4 q = load(reinterpret_cast<const uint4*>(address) + i);
            r.words[4 * i] = q.x;
            r.words[4 * i + 1] = q.y;
            r.words[4 * i + 2] = q.z;
            r.words[4 * i + 3] = q.w;
        }
    } else {
        const uint2 q = load(reinterpret_cast<const uint2*>(address));
        r.words[0] = q.x;
        r.words[Vector<T, V>::WORDS - 1] = q.y;
    }
    return r;
}

template <class T, int V> DEVICE void store_vector(uint64_t address, const Vector<T, V>& v) {
    if (Vector<T, V>::WORDS % 4 == 0) {
        #pragma unroll
        for (int i = 0; i < Vector<T, V>::WORDS / 4; i++) {
            uint4 q;
            q.x = v.words[4 * i];
            q.y = v.words[4 * i + 1];
            q.z = v.words[4 * i + 2];
            q.w = v.words[4 * i + 3];
            store(reinterpret_cast<uint4*>(address) + i, q);
        }
    } else {
        uint2 q;
        q.x = v.words[0];
        q.y = v.words[Vector<T, V>::WORDS - 1];
        store(reinterpret_cast<uint2*>(address), q);
    }
}

// Loads a vector element by element, from an address of any alignment.
template <class T, int V> DEVICE Vector<T, V> load_elements(uint64_t address) {
    const typename T::Bits* p = reinterpret_cast<const typename T::Bits*>(address);
    Vector<T, V> r;
    #pragma unroll
    for (int i = 0; i < Vector<T, V>::WORDS; i++) {
        if (sizeof(*p) == 2) {
            r.words[i] = static_cast<uint32_t>(load(p + 2 * i)) | static_cast<uint32_t>(load(p + 2 * i + 1)) << 16;
        } else if (sizeof(*p) == 4) {
            r.words[i] = static_cast<uint32_t>(load(p + i));
        } else {
            r.words[i] = static_cast<uint32_t>(static_cast<uint64_t>(load(p + i / 2)) >> (32 * (i & 1)));
        }
    }
    return r;
}

// Returns the bits of element i.
template <class T, int V> DEVICE typename T::Bits element(const Vector<T, V>& v, int i) {
    if (sizeof(typename T::Bits) == 2) return static_cast<typename T::Bits>(v.words[i / 2] >> (16 * (i & 1)));
    if (sizeof(typename T::Bits) == 4) return static_cast<typename T::Bits>(v.words[i]);
    const int last = Vector<T, V>::WORDS - 1;  // keeps the indices below in range for types that never reach them
    const int low = 2 * i < last ? 2 * i : last, high = 2 * i + 1 < last ? 2 * i + 1 : last;
    return static_cast<typename T::Bits>(static_cast<uint64_t>(v.words[low]) |
                                         static_cast<uint64_t>(v.words[high]) << 32);
}

// Sets elements i and i + 1, for an even i.
template <class T, int V> DEVICE void set_pair(Vector<T, V>& v, int i, typename T::Bits a, typename T::Bits b) {
    if (sizeof(typename T::Bits) == 2) {
        v.words[i / 2] = static_cast<uint32_t>(a) | static_cast<uint32_t>(b) << 16;
    } else if (sizeof(typename T::Bits) == 4) {
        v.words[i] = static_cast<uint32_t>(a);
        v.words[i + 1] = static_cast<uint32_t>(b);
    } else {
        const int last = Vector<T, V>::WORDS - 1, first = 2 * i + 3 <= last ? 2 * i : last - 3;
        v.words[first] = static_cast<uint32_t>(a);
        v.words[first + 1] = static_cast<uint32_t>(static_cast<uint64_t>(a) >> 32);
        v.words[first + 2] = static_cast<uint32_t>(b);
        v.words[first + 3] = static_cast<uint32_t>(static_cast<uint64_t>(b) >> 32);
    }
}
