// A chunk: a piece of one tensor that one block of threads works on.
#pragma once
#include "numbers.cuh"

struct Chunk {
    uint64_t address;   // of its first element in the tensor's own memory
    uint64_t offset;    // of its first element in the arenas, or byte in a destination
    uint32_t elements;  // or bytes
    uint32_t kind;
};

DEVICE Chunk load_chunk(const Chunk* table, uint64_t index) {
    const uint64_t* words = reinterpret_cast<const uint64_t*>(table + index);
    const uint64_t last = load(words + 2);
    Chunk chunk;
    chunk.address = load(words);
    chunk.offset = load(words + 1);
    chunk.elements = static_cast<uint32_t>(last);
    chunk.kind = static_cast<uint32_t>(last >> 32);
    return chunk;
}

// Copies bytes of any alignment with all threads of a block. Their number is a constant to the compiler: it would divide
// by `blockDim` to unroll the loops.
DEVICE void copy_bytes(uint64_t to, uint64_t from, uint32_t bytes, uint32_t threads) {
    const uint32_t wide = (to | from) % 16 == 0 ? bytes / 16 : 0;
    for (uint32_t i = threadIdx.x; i < wide; i += threads) {
        store(reinterpret_cast<uint4*>(to) + i, load(reinterpret_cast<const uint4*>(from) + i));
    }
    const uint32_t done = wide * 16;
    // Elements of 2 and 4 bytes, the usual ones, need not go byte by byte where only the vector is out of place.
    const uint32_t words = (to | from) % 4 == 0 ? (bytes - done) / 4 : 0;
    for (uint32_t i = threadIdx.x; i < words; i += threads) {
        store(reinterpret_cast<uint32_t*>(to + done) + i, load(reinterpret_cast<const uint32_t*>(from + done) + i));
    }
    const uint32_t rest = done + words * 4;
    const uint32_t halves = (to | from) % 2 == 0 ? (bytes - rest) / 2 : 0;
    for (uint32_t i = threadIdx.x; i < halves; i += threads) {
        store(reinterpret_cast<uint16_t*>(to + rest) + i, load(reinterpret_cast<const uint16_t*>(from + rest) + i));
    }
    for (uint32_t i = rest + halves * 2 + threadIdx.x; i < bytes; i += threads) {
        store(reinterpret_cast<uint8_t*>(to) + i, load(reinterpret_cast<const uint8_t*>(from) + i));
    }
}
