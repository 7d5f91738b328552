/* Limit of synthesis to many targets: sums f16 files in f64, and writes an f16 file for each target to fresh pages.
 *
 *     many THREADS WEIGHTS FOLDER FILE...
 *
 * Writes FOLDER/TARGET.safetensors. WEIGHTS has a line for each target, with a number for each FILE. All files have
 * the same tensors. Threads take blocks in turns, so that one sums while another writes. Tiles are converted once and
 * summed in registers. Results are written in large pieces from a buffer in the cache; mapped files took longer.
 */
#include <fcntl.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "turns.h"

enum { LANES = 8, VECTORS = 3, TILE = 96, GROUP = 8, BLOCK = 640 * TILE, SOURCES = 64, TARGETS = 64 };
typedef double vector __attribute__((vector_size(8 * LANES)));
typedef _Float16 half;
typedef half halves __attribute__((vector_size(2 * LANES), aligned(2)));

static const half *source[SOURCES];
static int file[TARGETS];
static double weight[TARGETS / GROUP][SOURCES][GROUP];
static int sources, targets;
static size_t n, next;
static const char *folder, *header;
static size_t header_bytes;
static __thread half *buffer;

static inline vector wide(const half *from)
{
#ifdef __AVX512F__
    /* Compilers convert such vectors one element at a time. */
    return (vector)_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)));
#else
    return __builtin_convertvector(*(const halves *)from, vector);
#endif
}

/* Adds all sources of a stripe for `count` targets, which is known when it is compiled. */
static inline __attribute__((always_inline))
void sum(const double *x, int group, const int count, half *to)
{
    vector sums[GROUP][VECTORS];
    for (int t = 0; t < count; t++)
        for (int v = 0; v < VECTORS; v++) sums[t][v] = (vector){0};
    for (int s = 0; s < sources; s++, x += TILE) {
        const vector *values = (const vector *)x;
        for (int t = 0; t < count; t++)
            for (int v = 0; v < VECTORS; v++) sums[t][v] += values[v] * weight[group][s][t];
    }
    for (int t = 0; t < count; t++)
        for (int v = 0; v < VECTORS; v++)
            *(halves *)(to + (group * GROUP + t) * BLOCK + v * LANES) = __builtin_convertvector(sums[t][v], halves);
}

/* Sums a tile for all targets. The result of target t begins at `to + t * BLOCK`. */
static void tile(size_t at, half *to)
{
    double x[SOURCES * TILE] __attribute__((aligned(64)));
    half last[TILE] = {0};
    for (int s = 0; s < sources; s++) {
        const half *from = source[s] + at;
        if (at + TILE > n) from = memcpy(last, from, (n - at) * sizeof *from);
        for (int i = 0; i < TILE; i += LANES)
            *(vector *)(x + s * TILE + i) = wide(from + i);
    }
    for (int i = 0; i < TILE; i += VECTORS * LANES)
        for (int group = 0; group * GROUP < targets; group++)
            switch (targets - group * GROUP) {
            case 1: sum(x + i, group, 1, to + i); break;
            case 2: sum(x + i, group, 2, to + i); break;
            case 3: sum(x + i, group, 3, to + i); break;
            case 4: sum(x + i, group, 4, to + i); break;
            case 5: sum(x + i, group, 5, to + i); break;
            case 6: sum(x + i, group, 6, to + i); break;
            case 7: sum(x + i, group, 7, to + i); break;
            default: sum(x + i, group, 8, to + i);
            }
}

static uint64_t many(int thread, int threads)
{
    (void)thread, (void)threads;
    if (!buffer) buffer = memory(targets * BLOCK * sizeof *buffer);
    for (size_t at; (at = __atomic_fetch_add(&next, BLOCK, __ATOMIC_RELAXED)) < n;) {
        size_t count = at + BLOCK > n ? n - at : BLOCK;
        for (size_t i = 0; i < count; i += TILE) tile(at + i, buffer + i);
        for (int t = 0; t < targets; t++)
            if (pwrite(file[t], buffer + t * BLOCK, 2 * count, header_bytes + 2 * at) < 0) perror("pwrite"), exit(1);
    }
    return n;
}

/* Drops the last results, and creates files with the header of the first source. */
static void create(void)
{
    char path[4096];
    next = 0;
    for (int t = 0; t < targets; t++) {
        snprintf(path, sizeof path, "%s/%d.safetensors", folder, t);
        if (file[t] > 0) close(file[t]);
        file[t] = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        if (file[t] < 0 || pwrite(file[t], header, header_bytes, 0) < 0) perror(path), exit(1);
    }
}

/* Reads a line of weights for each target. */
static void read_weights(const char *path)
{
    FILE *lines = fopen(path, "r");
    for (double w; lines && fscanf(lines, "%lf", &w) == 1 && targets < TARGETS; targets++)
        for (int s = 0; s < sources; s++) {
            if (s > 0 && fscanf(lines, "%lf", &w) != 1) fprintf(stderr, "%s: too few weights\n", path), exit(2);
            weight[targets / GROUP][s][targets % GROUP] = w;
        }
    if (targets < 2) fprintf(stderr, "%s: no weights of two targets\n", path), exit(2);
    fclose(lines);
}

int main(int argc, char **argv)
{
    if (argc < 5 || argc - 4 > SOURCES) {
        fprintf(stderr, "usage: many THREADS WEIGHTS FOLDER FILE...\n");
        return 2;
    }
    folder = argv[3], sources = argc - 4;
    read_weights(argv[2]);
    for (int s = sources; s-- > 0;) {
        struct stat about;
        int opened = open(argv[4 + s], O_RDONLY);
        if (opened < 0 || fstat(opened, &about) != 0) return perror(argv[4 + s]), 1;
        header = mmap(NULL, about.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, opened, 0);
        if (header == MAP_FAILED) return perror(argv[4 + s]), 1;
        header_bytes = 8 + *(const uint64_t *)header, n = (about.st_size - header_bytes) / 2;
        source[s] = (const half *)(header + header_bytes);
        close(opened);
    }
    prepare = create;
    return turns(many, atoi(argv[1]));
}
