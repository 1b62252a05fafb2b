/* Attention of a decoder layer: rotary, cache write, scores, softmax and values in one pass over K and V.
 * A task is (sequence b, kv head g, piece of positions): it reads its piece of K and V once for all query heads of the
 * group and all T query tokens; softmax partials (Milakov and Gimelshein 2018, arXiv:1805.02867) are merged after. */
#include <math.h>
#include <string.h>
#include "drivers/block_attention.h"

/* Positions that sequence b has already. */
static inline int64_t past_of(const hfa_block_call *call, int64_t b) { return call->row_past ? call->row_past[b] : call->past; }

/* Pieces end at fixed positions and not where threads or tokens would have them, so that a token's result does not
 * depend, to the last bit, on how many others are computed with it. */
void hfa_attention_plan(hfa_block_run *run) {
    const hfa_block_call *call = run->call;
    run->first_piece = call->first / HFA_PIECE;
    run->pieces = (call->past + call->tokens - 1) / HFA_PIECE - run->first_piece + 1;
}

/* Norm over the head (where there is one) and rotary, in place. */
static void prepare_head(const hfa_block_run *run, float *x, const void *norm, const float *angles, float *scratch) {
    const hfa_block *block = run->block;
    if (norm && !block->norms_rows)
        run->kernels->rms_norm(x, norm, block->head_dim, (float)block->norm_eps, (int)block->norm_style, x);
    run->kernels->rotate(x, angles, angles + HFA_MAX_HEAD_DIM, run->call->rotary, scratch);
}

static void load_angles(const hfa_block_run *run, int64_t b, int64_t t, float *angles) {
    const hfa_block_call *call = run->call;
    int64_t size = run->kernels->element;
    run->kernels->load((const char *)call->cos + (b * call->cos_stride_b + t * call->cos_stride_t) * size, angles, call->rotary);
    run->kernels->load((const char *)call->sin + (b * call->sin_stride_b + t * call->sin_stride_t) * size,
                       angles + HFA_MAX_HEAD_DIM, call->rotary);
}

/* Keys and values of the new positions within [from, to) of sequence b, kv head g. */
static void write_cache(const hfa_block_run *run, hfa_block_private *mine, int64_t b, int64_t g, int64_t from, int64_t to) {
    const hfa_block *block = run->block;
    const hfa_block_call *call = run->call;
    int64_t d = block->head_dim, size = hfa_attend_element(&run->attention);
    char *keys = (char *)call->keys + (b * call->key_stride_b + g * call->key_stride_g) * size;
    char *values = (char *)call->values + (b * call->value_stride_b + g * call->value_stride_g) * size;
    int64_t past = past_of(call, b);
    for (int64_t at = from > past ? from : past; at < to; at++) {
        int64_t t = at - past;
        const float *row = run->projected + (b * call->tokens + t) * run->projected_stride;
        memcpy(mine->queries, row + (block->heads + g) * d, (size_t)d * sizeof(float));
        load_angles(run, b, t, mine->angles);
        prepare_head(run, mine->queries, block->k_norm, mine->angles, mine->angles + 2 * HFA_MAX_HEAD_DIM);
        hfa_attend_write(&run->attention, mine->queries, 1, keys + at * call->key_stride_s * size);
        memcpy(mine->queries, row + (block->heads + block->kv_heads + g) * d, (size_t)d * sizeof(float));
        hfa_attend_write(&run->attention, mine->queries, 0, values + at * call->value_stride_s * size);
    }
}

/* scores [n] of query token t against positions start.. (counted from `first`): hide what the mask or causality hides */
static void apply_mask(const hfa_block_run *run, float *scores, int64_t n, int64_t start, int64_t b, int64_t t) {
    const hfa_block_call *call = run->call;
    int64_t at = b * call->mask_stride_b + t * call->mask_stride_t + start;
    if (call->mask_kind == HFA_MASK_NONE) {
        int64_t visible = past_of(call, b) - call->first + t + 1 - start;
        for (int64_t i = visible < 0 ? 0 : visible; i < n; i++) scores[i] = -INFINITY;
    } else if (call->mask_kind == HFA_MASK_BOOL) {
        const uint8_t *mask = (const uint8_t *)call->mask + at;
        for (int64_t i = 0; i < n; i++) scores[i] = mask[i] ? scores[i] : -INFINITY;
    } else {
        const char *mask = (const char *)call->mask + at * run->kernels->element;
        for (int64_t i = 0; i < n; i += 64) {
            float bias[64];
            int64_t some = n - i < 64 ? n - i : 64;
            run->kernels->load(mask + i * run->kernels->element, bias, some);
            for (int64_t j = 0; j < some; j++) scores[i + j] += bias[j];
        }
    }
}

/* Queries q0.. of a sequence and kv head, normed, rotated and packed; query i is head i % group of token i / group. */
static void prepare_queries(const hfa_block_run *run, hfa_block_private *mine, int64_t b, int64_t g, int64_t q0, int count) {
    int64_t d = run->block->head_dim, group = run->block->heads / run->block->kv_heads, loaded = -1;
    for (int i = 0; i < count; i++) {
        int64_t t = (q0 + i) / group, h = g * group + (q0 + i) % group;
        float *query = mine->queries + i * d;
        if (t != loaded) load_angles(run, b, loaded = t, mine->angles);
        memcpy(query, run->projected + (b * run->call->tokens + t) * run->projected_stride + h * d, (size_t)d * sizeof(float));
        prepare_head(run, query, run->block->q_norm, mine->angles, mine->angles + 2 * HFA_MAX_HEAD_DIM);
    }
    hfa_attend_pack(&run->attention, mine->queries, count, &mine->room);
}

static void attend(hfa_block_run *run, hfa_block_private *mine, int64_t task) {
    const hfa_block *block = run->block;
    const hfa_block_call *call = run->call;
    int64_t d = block->head_dim, group = block->heads / block->kv_heads, queries = group * call->tokens;
    int64_t piece = run->first_piece + task % run->pieces, head = task / run->pieces, b = head / block->kv_heads,
            g = head % block->kv_heads, size = hfa_attend_element(&run->attention);
    int64_t from = piece * HFA_PIECE, to = from + HFA_PIECE;
    if (from < call->first) from = call->first;
    if (to > past_of(call, b) + call->tokens) to = past_of(call, b) + call->tokens;
    if (from >= to) { /* a shorter sequence: what lies here is not its own, so that even reading it could do harm */
        for (int64_t i = task * queries; i < (task + 1) * queries; i++) {
            run->partial_max[i] = -INFINITY;
            run->partial_sum[i] = 0.0f;
        }
        memset(run->partial + task * queries * d, 0, (size_t)(queries * d) * sizeof(float));
        return;
    }
    int64_t n = to - from;
    write_cache(run, mine, b, g, from, to);
    const char *keys = (const char *)call->keys + (b * call->key_stride_b + g * call->key_stride_g + from * call->key_stride_s) * size;
    const char *values = (const char *)call->values
        + (b * call->value_stride_b + g * call->value_stride_g + from * call->value_stride_s) * size;
    for (int64_t q0 = 0; q0 < queries; q0 += HFA_QUERY_GROUP) {
        int count = (int)(queries - q0 < HFA_QUERY_GROUP ? queries - q0 : HFA_QUERY_GROUP);
        if (mine->ready != head || queries > HFA_QUERY_GROUP) prepare_queries(run, mine, b, g, q0, count);
        mine->ready = head;
        if (!hfa_attend_score(&run->attention, keys, call->key_stride_s, n, count, &mine->room)) run->is_strange = 1;
        for (int i = 0; i < count; i++) apply_mask(run, mine->room.scores + i * HFA_PIECE, n, from - call->first, b, (q0 + i) / group);
        int64_t first = task * queries + q0;
        hfa_attend_weigh(&run->attention, values, call->value_stride_s, n, count, &mine->room, run->partial + first * d,
                         run->partial_max + first, run->partial_sum + first);
    }
}

void hfa_attention_run(hfa_block_run *run, hfa_block_private *mine, int self) {
    for (int64_t task; (task = hfa_ranges_take(run->ranges[1], run->threads, self)) >= 0;) attend(run, mine, task);
}

void hfa_attention_merge(const hfa_block_run *run, float *out, int64_t stride) {
    const hfa_block *block = run->block;
    const hfa_block_call *call = run->call;
    int64_t d = block->head_dim, group = block->heads / block->kv_heads, queries = group * call->tokens;
    for (int64_t r = 0; r < run->rows; r++)
        for (int64_t h = 0; h < block->heads; h++) {
            int64_t b = r / call->tokens, t = r % call->tokens, g = h / group;
            int64_t first = (b * block->kv_heads + g) * run->pieces * queries + t * group + h % group;
            float top = -INFINITY, sum = 0.0f, *head = out + r * stride + h * d;
            memset(head, 0, (size_t)d * sizeof(float));
            for (int64_t p = 0; p < run->pieces; p++) {
                float m = run->partial_max[first + p * queries];
                top = m > top || m != m ? m : top;
            }
            if (top == -INFINITY) continue; /* a row that sees nothing gives zero, as torch's sdpa does */
            for (int64_t p = 0; p < run->pieces; p++) sum += run->partial_sum[first + p * queries] * expf(run->partial_max[first + p * queries] - top);
            for (int64_t p = 0; p < run->pieces; p++) {
                float weight = expf(run->partial_max[first + p * queries] - top) / sum;
                run->single->axpy(run->partial + (first + p * queries) * d, d, 1, d, &weight, 1, 1, head, d);
            }
            run->kernels->round(head, d);
        }
}
