// Arithmetic of the kernels, with the bits of a GPU: every operation rounds once, to nearest even, and nothing is
// flushed to zero. Build with -ffp-contract=off: otherwise the compiler may fuse two operations into one rounding.
#pragma once
#include <stdint.h>
#include <string.h>

template <class To, class From> static inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the widths differ");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline float bits_f32(uint32_t bits) { return same_bits<float>(bits); }
static inline uint32_t f32_bits(float value) { return same_bits<uint32_t>(value); }
static inline double bits_f64(uint64_t bits) { return same_bits<double>(bits); }
static inline uint64_t f64_bits(double value) { return same_bits<uint64_t>(value); }

static inline float fma_f32(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline float sub_f32(float a, float b) { return a - b; }
static inline float mul_f32(float a, float b) { return a * b; }
static inline float add_f32(float a, float b) { return a + b; }
static inline double fma_f64(double a, double b, double c) { return __builtin_fma(a, b, c); }
static inline float f64_to_f32(double value) { return (float)value; }
static inline double f32_to_f64(float value) { return (double)value; }

// Returns value / 2^shift, rounded to the nearest integer, ties to even.
static inline uint32_t shift_to_even(uint32_t value, unsigned shift) {
    uint32_t below = (1u << shift) - 1, half = 1u << (shift - 1);
    uint32_t quotient = value >> shift, rest = value & below;
    return quotient + (rest > half || (rest == half && (quotient & 1)));
}

static inline float bf16_to_f32(uint16_t bits) { return bits_f32((uint32_t)bits << 16); }

// Rounds to bf16. A NaN becomes 0x7fff, the only one that the GPU's conversions to 16 bits write.
static inline uint16_t f32_to_bf16(float value) {
    uint32_t bits = f32_bits(value);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : (uint16_t)shift_to_even(bits, 16);
}

static inline float f16_to_f32(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return bits_f32(sign | 0x7f800000 | (fraction ? 0x400000 : 0) | fraction << 13);
    if (exponent == 0) return bits_f32(sign | f32_bits((float)fraction * 0x1p-24f));
    return bits_f32(sign | (exponent + 112) << 23 | fraction << 13);
}

static inline uint16_t f32_to_f16(float value) {
    uint32_t bits = f32_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00);  // 2^16 and above; rounding takes 65520 there, too
    uint32_t exponent = magnitude >> 23, fraction = (magnitude & 0x7fffff) | 0x800000;
    if (exponent >= 113) return (uint16_t)(sign | (shift_to_even(magnitude, 13) - (112u << 10)));
    if (exponent < 102) return (uint16_t)sign;  // below 2^-25, half of the smallest subnormal
    return (uint16_t)(sign | shift_to_even(fraction, 126 - exponent));
}
