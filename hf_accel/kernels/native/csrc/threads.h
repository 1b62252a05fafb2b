/* Parallel regions, barrier, hand-out of chunks, scratch memory. */
#ifndef HFA_THREADS_H
#define HFA_THREADS_H
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define HFA_MAX_THREADS 256

typedef void (*hfa_task)(void *arg, int thread, int team);
/* task(arg, i, team) on a team of at most `threads` threads of the pool; serially (team 1) without a pool. */
void hfa_parallel(hfa_task task, void *arg, int threads);

/* Chunks 0..n-1 are dealt out as one contiguous range per thread, so that each thread reads its weights as one
 * sequential stream; who is done takes chunks from the others, so that a preempted core does not hold up everybody. */
typedef struct { _Alignas(64) atomic_llong next; int64_t end; } hfa_range;
void hfa_ranges_deal(hfa_range *ranges, int threads, int64_t chunks);
int64_t hfa_ranges_take(hfa_range *ranges, int threads, int self); /* -1: nothing left */

typedef struct { _Alignas(64) atomic_int arrived; _Alignas(64) atomic_int phase; } hfa_barrier;
void hfa_barrier_wait(hfa_barrier *barrier, int team);

/* At least `bytes`, 64-byte aligned, valid until the calling thread's next call; NULL when memory is short. The second kind is
 * for what runs while the first is in use. */
void *hfa_scratch(size_t bytes);
void *hfa_more_scratch(size_t bytes);
#endif
