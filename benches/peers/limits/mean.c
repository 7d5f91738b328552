/* Limit of averages: the mean of f32 safetensors files in f64, written to a fresh file.
 *
 *     mean THREADS OUT FILE...
 *
 * All files have the same header. Threads take blocks in turns, so that one sums while another writes.
 */
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "turns.h"

enum { BLOCK = 1 << 16, SOURCES = 64 };

static const float *source[SOURCES];
static int sources, file;
static size_t n, next, header_bytes;
static const char *path, *header;
static __thread float *buffer;

static uint64_t mean(int thread, int threads)
{
    (void)thread, (void)threads;
    if (!buffer) buffer = memory(BLOCK * sizeof *buffer);
    for (size_t at; (at = __atomic_fetch_add(&next, BLOCK, __ATOMIC_RELAXED)) < n;) {
        size_t count = at + BLOCK > n ? n - at : BLOCK;
        for (size_t i = 0; i < count; i++) {
            double sum = 0;
            for (int s = 0; s < sources; s++) sum += source[s][at + i];
            buffer[i] = sum / sources;
        }
        if (pwrite(file, buffer, 4 * count, header_bytes + 4 * at) < 0) perror("pwrite"), exit(1);
    }
    return n;
}

/* Drops the last result, and creates a file with the header of the first source. */
static void create(void)
{
    next = 0;
    if (file > 0) close(file);
    unlink(path);
    file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (file < 0 || pwrite(file, header, header_bytes, 0) < 0) perror(path), exit(1);
}

int main(int argc, char **argv)
{
    if (argc < 4 || argc - 3 > SOURCES) {
        fprintf(stderr, "usage: mean THREADS OUT FILE...\n");
        return 2;
    }
    path = argv[2], sources = argc - 3;
    for (int s = sources; s-- > 0;) {
        struct stat about;
        int opened = open(argv[3 + s], O_RDONLY);
        if (opened < 0 || fstat(opened, &about) != 0) return perror(argv[3 + s]), 1;
        header = mmap(NULL, about.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, opened, 0);
        if (header == MAP_FAILED) return perror(argv[3 + s]), 1;
        header_bytes = 8 + *(const uint64_t *)header, n = (about.st_size - header_bytes) / 4;
        source[s] = (const float *)(header + header_bytes);
        close(opened);
    }
    prepare = create;
    return turns(mean, atoi(argv[1]));
}
