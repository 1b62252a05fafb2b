/* One token of each sequence through a whole decoder: its row of the embedding, all layers, the norm behind them, the head, and the
 * best of the logits. Between layers is nothing but the rows, which hold values of the dtype as PyTorch's tensor does. */
#include <limits.h>
#include <math.h>
#include <string.h>
#include "drivers/product.h"

enum { BLOCK = 1024 }; /* logits that are looked through at once */

/* A value as an integer in the order of values: 0 and -0 are the same, and NaN is above all, as torch's argmax has it. */
static inline int32_t rank_of(uint32_t size, uint32_t infinite, int is_negative) {
    int32_t rank = is_negative ? -(int32_t)size : (int32_t)size;
    return size > infinite ? INT_MAX : rank;
}

#define RANKS(NAME, TYPE, BITS, INFINITE)                                                                             \
    static void NAME(const TYPE *x, int64_t n, int32_t *ranks) {                                                      \
        for (int64_t i = 0; i < n; i++)                                                                               \
            ranks[i] = rank_of(x[i] & ((1u << (BITS - 1)) - 1), INFINITE, x[i] >> (BITS - 1));                        \
    }
RANKS(ranks_of_bf16, uint16_t, 16, 0x7f80u)
RANKS(ranks_of_f16, uint16_t, 16, 0x7c00u)
RANKS(ranks_of_f32, uint32_t, 32, 0x7f800000u)

/* The first of the largest. */
static int64_t argmax(int64_t dtype, const char *x, int64_t n, int64_t element) {
    int32_t ranks[BLOCK], best = INT_MIN;
    int64_t at = 0;
    for (int64_t from = 0; from < n; from += BLOCK) {
        int64_t count = n - from < BLOCK ? n - from : BLOCK;
        const void *some = x + from * element;
        if (dtype == HFA_BF16) ranks_of_bf16(some, count, ranks);
        else if (dtype == HFA_F16) ranks_of_f16(some, count, ranks);
        else ranks_of_f32(some, count, ranks);
        int32_t most = INT_MIN;
        for (int64_t i = 0; i < count; i++) most = ranks[i] > most ? ranks[i] : most;
        if (most <= best && from) continue;
        best = most;
        for (at = 0; ranks[at] != best; at++) {}
        at += from;
    }
    return at;
}

static void multiply(const hfa_kernels *kernels, float *x, int64_t n, float by) {
    for (int64_t i = 0; i < n; i++) x[i] *= by;
    kernels->round(x, n);
}

static void finish_logits(const hfa_step *step, const hfa_kernels *kernels, char *logits) {
    float some[BLOCK];
    if (step->logit_scale == 1.0 && step->softcap == 0.0) return;
    for (int64_t from = 0; from < step->head.rows; from += BLOCK) {
        int64_t n = step->head.rows - from < BLOCK ? step->head.rows - from : BLOCK;
        char *at = logits + from * kernels->element;
        kernels->load(at, some, n);
        if (step->logit_scale != 1.0) multiply(kernels, some, n, (float)step->logit_scale);
        if (step->softcap != 0.0) {
            for (int64_t i = 0; i < n; i++) some[i] /= (float)step->softcap;
            kernels->round(some, n);
            for (int64_t i = 0; i < n; i++) some[i] = tanhf(some[i]);
            kernels->round(some, n);
            multiply(kernels, some, n, (float)step->softcap);
        }
        kernels->store(some, at, n);
    }
}

/* The row of sequence b. */
static void embed(const hfa_step *step, const hfa_step_call *call, const hfa_kernels *kernels, int64_t b, void *row) {
    int64_t size = kernels->element;
    float *x = call->room, *more = x + (step->hidden + 15) / 16 * 16;
    kernels->load((const char *)step->embedding + call->choice[b] * step->embedding_stride * size, x, step->hidden);
    if (step->embedding_scale != 1.0) multiply(kernels, x, step->hidden, (float)step->embedding_scale);
    if (step->positions) {
        int64_t at = call->position[b] + step->positions_offset;
        kernels->load((const char *)step->positions + at * step->positions_stride * size, more, step->hidden);
        kernels->add(x, more, step->hidden, x);
    }
    kernels->store(x, row, step->hidden);
}

static int is_valid(const hfa_step *step, const hfa_step_call *call) {
    if ((uint64_t)step->dtype >= HFA_DTYPES || call->count < 1) return 0;
    for (int64_t b = 0; b < call->count; b++) {
        if (call->choice[b] < 0 || call->choice[b] >= step->vocabulary || call->position[b] < 0) return 0;
        if (step->positions && call->position[b] + step->positions_offset >= step->positions_rows) return 0;
    }
    return 1;
}

typedef struct { const hfa_step *step; const hfa_step_call *call; const hfa_kernels *kernels; } last_call;

/* What logits become, and the best of each sequence's, which threads share out. */
static void choose_task(void *arg, int self, int team) {
    const last_call *last = arg;
    const hfa_step *step = last->step;
    for (int64_t b = self; b < last->call->count; b += team) {
        char *logits = (char *)last->call->logits + b * step->head.rows * last->kernels->element;
        finish_logits(step, last->kernels, logits);
        last->call->choice[b] = argmax(step->dtype, logits, step->head.rows, last->kernels->element);
    }
}

int hfa_step_forward(const hfa_step *step, const hfa_step_call *call) {
    if (!is_valid(step, call)) return -1;
    const hfa_kernels *kernels = hfa_active_kernels((int)step->dtype);
    char *rows = call->row;
    int64_t row_bytes = step->hidden * kernels->element;
    for (int64_t b = 0; b < call->count; b++) embed(step, call, kernels, b, rows + b * row_bytes);
    for (int64_t i = 0; i < step->layers; i++) {
        const hfa_step_layer *layer = &step->layer[i];
        hfa_block_call *at = &call->layer[i];
        at->hidden = at->out = rows; /* every row is read before it is written */
        at->batch = call->count;
        at->tokens = 1;
        at->threads = call->threads;
        at->angles = layer->angles;
        at->angles_are_f32 = layer->are_f32;
        at->cos = layer->cos;
        at->sin = layer->sin;
        at->cos_stride_b = at->sin_stride_b = layer->stride;
        at->angles_at = call->position;
        int status = hfa_block_forward(layer->block, at);
        if (status) return status;
    }
    for (int64_t b = 0; step->norm.kind && b < call->count; b++) {
        kernels->load(rows + b * row_bytes, call->room, step->hidden);
        kernels->norm(call->room, &step->norm, step->hidden, call->room);
        kernels->store(call->room, rows + b * row_bytes, step->hidden);
    }
    const hfa_matrix *head = &step->head;
    int64_t flags = step->dtype | call->threads << 16;
    int status = head->format == HFA_DENSE
                     ? hfa_linear(rows, head->weight, head->bias, call->logits, call->count, head->inner, head->rows, head->stride, flags)
                     : hfa_packed_linear(rows, head, call->logits, call->count, flags);
    if (status) return status;
    last_call last = {step, call, kernels};
    hfa_parallel(choose_task, &last, (int)(call->count < call->threads ? call->count : call->threads));
    return 0;
}
