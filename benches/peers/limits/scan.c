/* Limit of synthesis: reads mapped files, and adds their 64-bit words up.
 *
 *     scan THREADS FILE...
 */
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "turns.h"

static const uint64_t **words;
static size_t *lengths;
static int files;

static uint64_t scan(int thread, int threads)
{
    uint64_t sums[8] = {0}, total = 0;
    for (int f = 0; f < files; f++) {
        size_t n = lengths[f] / 8, from = n / threads * thread;
        size_t to = thread + 1 == threads ? n : n / threads * (thread + 1);
        const uint64_t *w = words[f];
        for (; from + 8 <= to; from += 8)
            for (int i = 0; i < 8; i++) sums[i] += w[from + i];
    }
    for (int i = 0; i < 8; i++) total += sums[i];
    return total;
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: scan THREADS FILE...\n");
        return 2;
    }
    files = argc - 2;
    words = calloc(files, sizeof *words), lengths = calloc(files, sizeof *lengths);
    for (int f = 0; f < files; f++) {
        struct stat about;
        int file = open(argv[f + 2], O_RDONLY);
        if (file < 0 || fstat(file, &about) != 0) return perror(argv[f + 2]), 1;
        lengths[f] = about.st_size;
        void *at = mmap(NULL, lengths[f], PROT_READ, MAP_SHARED, file, 0);
        if (at == MAP_FAILED) return perror(argv[f + 2]), 1;
        words[f] = at;
        close(file);
    }
    return turns(scan, atoi(argv[1]));
}
