/* The floor of everything that two cores tell each other: one counter, which both count up in turns.
 *
 * usage: shared_counter CORE CORE ROUND_TRIPS
 *
 * Prints how many nanoseconds a round trip takes. One thread makes the even numbers odd, the other the odd ones even, so
 * that the counter's cache line goes there and back once in each round trip.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define LINE 64 /* bytes of a cache line */

static _Alignas(2 * LINE) struct {
    atomic_ullong value;
    char alone[2 * LINE - sizeof(atomic_ullong)];
} counter;

static unsigned long long last;

struct side {
    int core;
    unsigned first; /* the number that it waits for at the start */
};

static void *count(void *argument)
{
    const struct side *side = argument;
    cpu_set_t cores;

    CPU_ZERO(&cores);
    CPU_SET(side->core, &cores);
    if (pthread_setaffinity_np(pthread_self(), sizeof cores, &cores)) {
        fprintf(stderr, "shared_counter: cannot run on core %d\n", side->core);
        exit(1);
    }
    for (unsigned long long next = side->first; next < last; next += 2) {
        while (atomic_load_explicit(&counter.value, memory_order_acquire) != next)
            ;
        atomic_store_explicit(&counter.value, next + 1, memory_order_release);
    }
    return NULL;
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * t.tv_sec + t.tv_nsec;
}

int main(int argc, char **argv)
{
    if (argc != 4 || (last = 2 * strtoull(argv[3], NULL, 10)) == 0) {
        fprintf(stderr, "usage: shared_counter CORE CORE ROUND_TRIPS\n");
        return 2;
    }
    struct side here = {atoi(argv[1]), 0}, there = {atoi(argv[2]), 1};
    pthread_t other;
    double started = now();

    if (pthread_create(&other, NULL, count, &there)) {
        fprintf(stderr, "shared_counter: cannot start a thread\n");
        return 1;
    }
    count(&here);
    pthread_join(other, NULL);
    printf("%.2f\n", (now() - started) / (last / 2));
    return 0;
}
