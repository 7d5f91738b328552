// Chunk table: one launch works on any number of tensors, one block of threads on each chunk of a tensor.
//
// Memory: a chunk takes 24 bytes in the table. Every thread of its block reads them once.
//
// The host chooses the size, from 2,048 to 32,768 elements. 2,048 elements are two vectors for each of 256 threads:
// with fewer, starting a block costs more than its work. Each chunk has its own dtype, so mixed models take one launch.
//
// Tried and rejected:
// - Chunks of up to 65,536 elements: on paper, the last blocks of 100 million parameters waste 9 to 14% of an H200.
// - Chunks of 65,536 elements for every model: below 8.6 million parameters, an H200 has more multiprocessors (132)
//   than there are blocks.
// - `blockDim.x` as the stride of `copy_bytes`: the compiler divides by it to unroll the loops. The number of threads
//   is therefore an argument, and a constant at every call.
#pragma once
#include "numbers.cuh"

struct Chunk {
    uint64_t address;   // first element in the tensor's own memory
    uint64_t offset;    // first element in the arenas; in a copy, first byte in the destination
    uint32_t elements;  // in a copy, bytes
    uint32_t kind;      // dtype, see Kind
};

// Keys of no element, in what `look` has found: all are finite, or no update is due. Then this replay of a CUDA graph
// has none, or another device has found an element.
#define NOTHING_FOUND 0xffffffffffffffff
#define NOT_DUE static_cast<uint64_t>(3)

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

// Copies bytes of any alignment with all threads of a block.
DEVICE void copy_bytes(uint64_t to, uint64_t from, uint32_t bytes, uint32_t threads) {
    const uint32_t wide = (to | from) % 16 == 0 ? bytes / 16 : 0;
    for (uint32_t i = threadIdx.x; i < wide; i += threads) {
        store(reinterpret_cast<uint4*>(to) + i, load(reinterpret_cast<const uint4*>(from) + i));
    }
    const uint32_t done = wide * 16;
    // Elements of 4 and 2 bytes, the usual ones, are aligned even if a vector is not: move them whole.
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
