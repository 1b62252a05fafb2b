/* y = x W^T + b for few rows of x, and y = x W + b for weights stored transposed (GPT-2's Conv1D). */
#include <string.h>
#include "drivers/product.h"

typedef struct { hfa_products products; hfa_activations x; hfa_range *ranges; int threads; } linear_call;

static void linear_task(void *arg, int thread, int team) {
    linear_call *call = arg;
    (void)team; /* every range is emptied whatever the size of the team */
    hfa_products_run(&call->products, &call->x, call->ranges, call->threads, thread);
}

/* ranges, then x packed, in one piece of scratch */
static int run_products(linear_call *call, const void *x, int64_t k, int64_t bytes, int64_t threads) {
    const hfa_kernels *kernels = call->products.kernels;
    int m = call->products.m;
    call->threads = hfa_useful_threads(bytes, threads);
    size_t range_bytes = sizeof(hfa_range) * (size_t)call->threads;
    char *scratch = hfa_scratch(range_bytes + hfa_packed_bytes(kernels, m, k));
    if (!scratch) return -1;
    call->ranges = (hfa_range *)scratch;
    call->x.packed[HFA_DENSE] = scratch + range_bytes;
    for (int m0 = 0; m0 < m; m0 += HFA_DOT_ROWS)
        kernels->pack((const char *)x + m0 * k * kernels->element, k, m - m0 < HFA_DOT_ROWS ? m - m0 : HFA_DOT_ROWS, k,
                      scratch + range_bytes + hfa_packed_bytes(kernels, m0, k));
    hfa_ranges_deal(call->ranges, call->threads, hfa_products_plan(&call->products, call->threads));
    hfa_parallel(linear_task, call, call->threads);
    return 0;
}

typedef struct {
    const hfa_kernels *kernels;
    const float *x; /* [m, k] */
    const char *weight, *bias;
    char *y, *sums; /* sums: fp32 [2, m, block] per thread */
    hfa_range *ranges;
    int64_t k, n, stride, block;
    int m, threads;
} transposed_call;

enum { DEPTH = 512 }; /* rows summed apart before they join the total: long sums keep their accuracy */

/* A thread owns blocks of columns and walks down all rows of W with its sums in L1. */
static void transposed_task(void *arg, int thread, int team) {
    transposed_call *call = arg;
    const hfa_kernels *kernels = call->kernels;
    int64_t count = call->m * call->block;
    float *total = (float *)call->sums + 2 * count * thread, *sums = total + count;
    (void)team;
    for (int64_t chunk; (chunk = hfa_ranges_take(call->ranges, call->threads, thread)) >= 0;) {
        int64_t column = chunk * call->block, n = call->n - column < call->block ? call->n - column : call->block;
        memset(total, 0, sizeof(float) * (size_t)count);
        for (int64_t k = 0; k < call->k; k += DEPTH) {
            int64_t depth = call->k - k < DEPTH ? call->k - k : DEPTH;
            memset(sums, 0, sizeof(float) * (size_t)count);
            kernels->axpy(call->weight + (k * call->stride + column) * kernels->element, call->stride, depth, n,
                          call->x + k, call->k, call->m, sums, call->block);
            for (int64_t i = 0; i < count; i++) total[i] += sums[i];
        }
        for (int m = 0; m < call->m; m++)
            kernels->finish(total + m * call->block, call->bias ? call->bias + column * kernels->element : NULL, n,
                            call->y + (m * call->n + column) * kernels->element);
    }
}

static int run_transposed(const hfa_kernels *kernels, const void *x, const hfa_matrix *w, void *y, int m, int64_t threads) {
    transposed_call call = {.kernels = kernels, .weight = w->weight, .bias = w->bias, .y = y, .k = w->inner, .n = w->rows,
                            .stride = w->stride, .m = m};
    call.threads = hfa_useful_threads(w->rows * w->inner * kernels->element, threads);
    /* 1024 columns are one or two pages of a row: wide enough to stream, narrow enough to share out */
    call.block = (w->rows / (call.threads * 2) + 63) / 64 * 64;
    if (call.block > 1024) call.block = 1024;
    if (call.block < 64) call.block = 64;
    size_t range_bytes = sizeof(hfa_range) * (size_t)call.threads;
    size_t sum_bytes = sizeof(float) * (size_t)(2 * m * call.block * call.threads);
    char *scratch = hfa_scratch(range_bytes + sum_bytes + sizeof(float) * (size_t)(m * w->inner));
    if (!scratch) return -1;
    call.ranges = (hfa_range *)scratch;
    call.sums = scratch + range_bytes;
    call.x = (float *)(scratch + range_bytes + sum_bytes);
    kernels->load(x, (float *)(scratch + range_bytes + sum_bytes), m * w->inner);
    hfa_ranges_deal(call.ranges, call.threads, (w->rows + call.block - 1) / call.block);
    hfa_parallel(transposed_task, &call, call.threads);
    return 0;
}

int hfa_linear(const void *x, const void *weight, const void *bias, void *y, int64_t m, int64_t k, int64_t n, int64_t stride,
               int64_t flags) {
    int64_t dtype = flags & 0xff, threads = flags >> 16;
    int is_transposed = flags >> 8 & 1;
    if (m < 1 || (is_transposed && m > HFA_MAX_ROWS) || k < 1 || n < 1 || dtype >= HFA_DTYPES || !x || !weight || !y) return -1;
    hfa_matrix w = {.weight = weight, .bias = bias, .stride = stride, .rows = n, .inner = k};
    const hfa_kernels *kernels = hfa_active_kernels((int)dtype);
    if (m > HFA_MAX_ROWS) return hfa_packed_linear(x, &w, y, m, dtype | threads << 16);
    if (is_transposed) return run_transposed(kernels, x, &w, y, (int)m, threads);
    linear_call call = {.products = {.kernels = kernels, .count = 1, .m = (int)m, .item = {{&w, y, n}}}};
    return run_products(&call, x, k, k * n * kernels->element, threads);
}

int hfa_linear_group(const hfa_group *g) {
    if (!g->x || g->m < 1 || g->m > HFA_MAX_ROWS || g->k < 1 || g->count < 1 || g->count > HFA_MAX_GROUP || (uint64_t)g->dtype >= HFA_DTYPES)
        return -1;
    const hfa_kernels *kernels = hfa_active_kernels((int)g->dtype);
    linear_call call = {.products = {.kernels = kernels, .count = (int)g->count, .m = (int)g->m}};
    hfa_matrix weights[HFA_MAX_GROUP];
    int64_t bytes = 0;
    for (int i = 0; i < g->count; i++) {
        const hfa_group_item *item = &g->item[i];
        if (item->rows < 1 || !item->weight || !item->out) return -1;
        weights[i] = (hfa_matrix){.weight = item->weight, .bias = item->bias, .stride = item->stride, .rows = item->rows, .inner = g->k};
        call.products.item[i] = (hfa_product){&weights[i], item->out, item->rows};
        bytes += item->rows * g->k * kernels->element;
    }
    return run_products(&call, g->x, g->k, bytes, g->threads);
}
