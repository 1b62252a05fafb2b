/* Reads memory as the products read weights, and does nothing with it: the rate that decoding is measured against. */
#include "native.h"
#include "kernels.h"
#include "threads.h"

typedef struct { const char *data; int64_t bytes; hfa_range *ranges; int threads; _Atomic uint64_t sum; } stream_call;

enum { CHUNK = 1 << 20 };

static void stream_task(void *arg, int thread, int team) {
    stream_call *call = arg;
    uint64_t sums[4] = {0};
    (void)team;
    for (int64_t chunk; (chunk = hfa_ranges_take(call->ranges, call->threads, thread)) >= 0;) {
        const char *p = call->data + chunk * CHUNK;
        for (int64_t i = 0; i < CHUNK; i += 256) {
#pragma GCC unroll 4
            for (int line = 0; line < 4; line++) { /* one word brings in its whole line */
                __builtin_prefetch(p + i + 64 * line + HFA_PREFETCH_BYTES, 0, HFA_PREFETCH_LEVEL);
                sums[line] += *(const uint64_t *)(p + i + 64 * line);
            }
        }
    }
    call->sum += sums[0] + sums[1] + sums[2] + sums[3]; /* used, so that the reads are not optimised away */
}

/* data aligned to 64 bytes; returns a sum over the whole mebibytes of it */
uint64_t hfa_stream(const void *data, int64_t bytes, int64_t threads) {
    stream_call call = {.data = data, .bytes = bytes, .threads = threads < 1 ? 1 : threads > HFA_MAX_THREADS ? HFA_MAX_THREADS : (int)threads};
    call.ranges = hfa_scratch(sizeof(hfa_range) * (size_t)call.threads);
    if (!data || !call.ranges) return 0;
    hfa_ranges_deal(call.ranges, call.threads, bytes / CHUNK);
    hfa_parallel(stream_task, &call, call.threads);
    return call.sum;
}
