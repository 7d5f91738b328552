/* Shared by the limits: for every line on stdin, all threads do the work once, and one JSON object with its seconds is
 * printed. The threads start together.
 */
#ifndef TURNS_H
#define TURNS_H

#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

/* Work of one thread. Its result depends on all of it, so that no compiler leaves it out. */
typedef uint64_t work_fn(int thread, int threads);

static int threads;
static work_fn *work;
static uint64_t *sums;
static pthread_barrier_t begin, end;
/* Prepares a round; not timed. */
static void (*prepare)(void);

static void *serve(void *arg)
{
    int thread = (int)(intptr_t)arg;
    for (;;) {
        pthread_barrier_wait(&begin);
        sums[thread] = work(thread, threads);
        pthread_barrier_wait(&end);
    }
    return NULL;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* Allocates memory, in large pages if the system has them, and touches it. */
static inline void *memory(size_t bytes)
{
    void *p = NULL;
    if (posix_memalign(&p, 1 << 21, bytes + 1) != 0) {
        fprintf(stderr, "no memory for %zu bytes\n", bytes);
        exit(1);
    }
    madvise(p, bytes, MADV_HUGEPAGE);
    for (size_t i = 0; i < bytes; i += 4096) ((volatile char *)p)[i] = 0;
    return p;
}

static int turns(work_fn *given, int count)
{
    pthread_t thread;
    char line[256];
    threads = count, work = given, sums = calloc(count, sizeof *sums);
    pthread_barrier_init(&begin, NULL, count + 1);
    pthread_barrier_init(&end, NULL, count + 1);
    for (int i = 0; i < count; i++)
        if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)i) != 0) return 1;
    while (fgets(line, sizeof line, stdin)) {
        if (prepare) prepare();
        double start = now();
        pthread_barrier_wait(&begin);
        pthread_barrier_wait(&end);
        double seconds = now() - start;
        uint64_t sum = 0;
        for (int i = 0; i < count; i++) sum += sums[i];
        printf("{\"seconds\": %.9f, \"sum\": %llu}\n", seconds, (unsigned long long)sum);
        fflush(stdout);
    }
    return 0;
}

#endif
