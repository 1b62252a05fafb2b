/* Threads come from the OpenMP pool that torch already runs: a second pool would fight it for the cores. Python finds
 * the runtime's GOMP_parallel (libgomp, and LLVM's libomp which offers the same entry) and hands it over. */
#include "threads.h"
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#include "native.h"

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*query_function)(void);

static _Atomic(parallel_function) parallel;
static _Atomic(query_function) thread_num, num_threads;

void hfa_set_threading(void *parallel_address, void *thread_num_address, void *num_threads_address) {
    int complete = parallel_address && thread_num_address && num_threads_address;
    thread_num = (query_function)thread_num_address;
    num_threads = (query_function)num_threads_address;
    parallel = complete ? (parallel_function)parallel_address : (parallel_function)0;
}

typedef struct { hfa_task task; void *arg; } region;

static void enter(void *data) {
    region *r = data;
    r->task(r->arg, thread_num(), num_threads());
}

void hfa_parallel(hfa_task task, void *arg, int threads) {
    parallel_function run = parallel;
    if (threads <= 1 || !run) {
        task(arg, 0, 1);
        return;
    }
    region r = {task, arg};
    run(enter, &r, (unsigned)threads, 0);
}

void hfa_ranges_deal(hfa_range *ranges, int threads, int64_t chunks) {
    for (int i = 0; i < threads; i++) {
        atomic_store_explicit(&ranges[i].next, chunks * i / threads, memory_order_relaxed);
        ranges[i].end = chunks * (i + 1) / threads;
    }
}

int64_t hfa_ranges_take(hfa_range *ranges, int threads, int self) {
    for (int i = 0; i < threads; i++) {
        hfa_range *range = &ranges[self + i < threads ? self + i : self + i - threads];
        if (atomic_load_explicit(&range->next, memory_order_relaxed) >= range->end) continue;
        int64_t chunk = atomic_fetch_add_explicit(&range->next, 1, memory_order_relaxed);
        if (chunk < range->end) return chunk;
    }
    return -1;
}

void hfa_barrier_wait(hfa_barrier *barrier, int team) {
    if (team <= 1) return;
    int phase = atomic_load_explicit(&barrier->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->arrived, 1, memory_order_acq_rel) == team - 1) {
        atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&barrier->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&barrier->phase, memory_order_acquire) == phase; spins++) {
        if (spins < 4000) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            __asm__ volatile("yield");
#endif
        } else {
            sched_yield(); /* whoever we wait for may need this core */
        }
    }
}

typedef struct { void *memory[2]; size_t bytes[2]; } scratch;

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void release(void *p) {
    for (int i = 0; i < 2; i++) free(((scratch *)p)->memory[i]);
    free(p);
}

static void create_key(void) { pthread_key_create(&scratch_key, release); }

enum { PAGE = 4096, LARGE_PAGE = 2 << 20 };

/* Memory that fills large pages begins at one and asks for them; the system may refuse, and memory is memory. */
static void *allocate(size_t bytes) {
#ifdef __linux__
    if (bytes >= LARGE_PAGE) {
        void *memory = aligned_alloc(LARGE_PAGE, bytes);
        if (memory) madvise(memory, bytes / LARGE_PAGE * LARGE_PAGE, MADV_HUGEPAGE);
        if (memory) return memory;
    }
#endif
    return aligned_alloc(PAGE, bytes);
}

static void *scratch_of(int kind, size_t bytes) {
    static _Thread_local scratch *mine;
    if (!mine) {
        pthread_once(&scratch_once, create_key);
        mine = calloc(1, sizeof *mine);
        if (!mine) return NULL;
        pthread_setspecific(scratch_key, mine);
    }
    if (mine->bytes[kind] < bytes) {
        size_t page = bytes + bytes / 4 < LARGE_PAGE ? PAGE : LARGE_PAGE;
        size_t rounded = (bytes + bytes / 4 + page - 1) / page * page;
        free(mine->memory[kind]);
        mine->memory[kind] = allocate(rounded);
        mine->bytes[kind] = mine->memory[kind] ? rounded : 0;
    }
    return mine->memory[kind];
}

void *hfa_scratch(size_t bytes) { return scratch_of(0, bytes); }

void *hfa_more_scratch(size_t bytes) { return scratch_of(1, bytes); }
