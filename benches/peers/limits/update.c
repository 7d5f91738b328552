/* Limit of an update of two averages: one fused loop that moves the same bytes with next to no arithmetic.
 *
 *     update plain|compensated|bf16 PARAMETERS THREADS
 *
 * plain:        reads f32 parameters, and updates two f32 averages in place (20 bytes a parameter)
 * compensated:  also updates a term of 16 bits for each average (28 bytes)
 * bf16:         reads parameters of 16 bits (18 bytes)
 */
#include <string.h>

#include "turns.h"

static size_t n;
static float *restrict p, *restrict a, *restrict b;
static uint16_t *restrict half, *restrict c, *restrict d;

/* Bounds of a thread's elements. */
static size_t from(int thread, int threads) { return n / threads * thread; }
static size_t to(int thread, int threads) { return thread + 1 == threads ? n : from(thread + 1, threads); }

static uint64_t plain(int thread, int threads)
{
    for (size_t i = from(thread, threads), last = to(thread, threads); i < last; i++) {
        a[i] += 0.3f * (p[i] - a[i]);
        b[i] += 0.05f * (p[i] - b[i]);
    }
    return 0;
}

static uint64_t compensated(int thread, int threads)
{
    for (size_t i = from(thread, threads), last = to(thread, threads); i < last; i++) {
        a[i] += 0.3f * (p[i] - a[i]);
        b[i] += 0.05f * (p[i] - b[i]);
        c[i] += 1;
        d[i] += 1;
    }
    return 0;
}

static float wide(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

static uint64_t bf16(int thread, int threads)
{
    for (size_t i = from(thread, threads), last = to(thread, threads); i < last; i++) {
        float value = wide(half[i]);
        a[i] += 0.3f * (value - a[i]);
        b[i] += 0.05f * (value - b[i]);
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: update plain|compensated|bf16 PARAMETERS THREADS\n");
        return 2;
    }
    n = strtoull(argv[2], NULL, 10);
    a = memory(4 * n), b = memory(4 * n);
    int few = strcmp(argv[1], "bf16") == 0, more = strcmp(argv[1], "compensated") == 0;
    if (few) half = memory(2 * n);
    else p = memory(4 * n);
    if (more) c = memory(2 * n), d = memory(2 * n);
    for (size_t i = 0; i < n; i++) {
        if (few) half[i] = 0x3f00 + i % 251;
        else p[i] = i % 251 / 128.0f - 1.0f;
    }
    return turns(few ? bf16 : more ? compensated : plain, atoi(argv[3]));
}
