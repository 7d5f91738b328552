/* Limit of sums in f64: fused multiply-adds in registers.
 *
 *     peak COUNT THREADS
 *
 * COUNT is the number of multiply-adds. A loop has enough sums that none waits for its own last result.
 */
#include "turns.h"

enum { LANES = 8, SUMS = 12 };
typedef double vector __attribute__((vector_size(8 * LANES)));

static uint64_t count;

static uint64_t peak(int thread, int threads)
{
    vector sums[SUMS], factor = {0}, term = {0};
    (void)thread;
    for (int i = 0; i < LANES; i++) factor[i] = 0.999999, term[i] = 1e-6 * i;
    for (int s = 0; s < SUMS; s++) sums[s] = term + (double)s;
    for (uint64_t left = count / threads / (LANES * SUMS); left > 0; left--) {
        for (int s = 0; s < SUMS; s++) sums[s] = sums[s] * factor + term;
        /* Hides from the compiler that the values stay the same. */
        __asm__ volatile("" : "+v"(factor), "+v"(term));
    }
    double total = 0;
    for (int s = 0; s < SUMS; s++)
        for (int i = 0; i < LANES; i++) total += sums[s][i];
    return (uint64_t)total;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: peak COUNT THREADS\n");
        return 2;
    }
    count = strtoull(argv[1], NULL, 10);
    return turns(peak, atoi(argv[2]));
}
