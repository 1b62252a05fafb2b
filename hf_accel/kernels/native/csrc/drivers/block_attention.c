/* Attention of a decoder layer: rotary, cache write, scores, softmax and values.
 * Of few rows a task is (sequence b, kv head g, piece of positions): it reads its piece of K and V once for all query heads of the
 * group and all query tokens; softmax partials (Milakov and Gimelshein 2018, arXiv:1805.02867) are merged after. So it is of many
 * sequences with a token each, or in buffers of their own; other rows, where they are many, are prompts, see prompt.c. */
#include <math.h>
#include <string.h>
#include "drivers/block_attention.h"

/* Where sequence b lies, and how much of it there is before this pass. */
static hfa_row row_of(const hfa_block_run *run, int64_t b) {
    const hfa_block_call *call = run->call;
    int64_t at = run->sequence + b, size = hfa_attend_element(&run->attention);
    hfa_row row;
    if (call->rows) {
        row = call->rows[at];
    } else {
        row = (hfa_row){(char *)call->keys + at * call->key_stride_b * size, (char *)call->values + at * call->value_stride_b * size,
                        call->key_stride_g, call->key_stride_s, call->value_stride_g, call->value_stride_s,
                        call->row_past ? call->row_past[at] : call->past, call->first};
    }
    row.past += run->token;
    return row;
}

/* Keys (values) of kv head g from position `at` on. */
static char *keys_at(const hfa_block_run *run, const hfa_row *row, int64_t g, int64_t at) {
    return (char *)row->keys + (g * row->key_stride_g + at * row->key_stride_s) * hfa_attend_element(&run->attention);
}
static char *values_at(const hfa_block_run *run, const hfa_row *row, int64_t g, int64_t at) {
    return (char *)row->values + (g * row->value_stride_g + at * row->value_stride_s) * hfa_attend_element(&run->attention);
}

int64_t hfa_attention_bytes(const hfa_block_run *run) {
    int64_t words = 0;
    for (int64_t b = 0; b < run->batch; b++) {
        hfa_row row = row_of(run, b);
        words += (row.past - row.first) * (row.key_stride_s + row.value_stride_s);
    }
    return words * run->block->kv_heads * hfa_attend_element(&run->attention);
}

/* Pieces end at fixed positions and not where threads or tokens would have them, so that a token's result does not
 * depend, to the last bit, on how many others are computed with it. */
void hfa_attention_plan(hfa_block_run *run) {
    run->queries = run->block->heads / run->block->kv_heads * run->tokens;
    run->tasks[0] = 0;
    for (int64_t b = 0; b < run->batch; b++) {
        hfa_row row = row_of(run, b);
        int64_t pieces = (row.past + run->tokens - 1) / HFA_PIECE - row.first / HFA_PIECE + 1;
        run->tasks[b + 1] = run->tasks[b] + run->block->kv_heads * pieces;
    }
}

static int64_t pieces_of(const hfa_block_run *run, int64_t b) { return (run->tasks[b + 1] - run->tasks[b]) / run->block->kv_heads; }

/* The sequence that a task belongs to. */
static int64_t sequence_of(const hfa_block_run *run, int64_t task) {
    int64_t low = 0, high = run->batch;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (run->tasks[middle] <= task) low = middle;
        else high = middle;
    }
    return low;
}

/* A head of `extent` HFA_EACH_HEAD or HFA_ALL_HEADS normed, in place. */
static void norm_head(const hfa_block_run *run, float *x, const hfa_norm *norm, int64_t head) {
    int64_t d = run->block->head_dim, shift = head * d * run->kernels->element;
    if (run->block->norm_extent == HFA_EACH_HEAD) {
        run->kernels->norm(x, norm, d, x);
        return;
    }
    hfa_norm own = *norm;
    if (own.weight) own.weight = (const char *)own.weight + shift;
    if (own.bias) own.bias = (const char *)own.bias + shift;
    run->kernels->norm(x, &own, d, x);
}

static int64_t rotary_size(const hfa_block_run *run) { return run->block->rotary_size ? run->block->rotary_size : run->call->angles; }

/* The columns that turn, in place. Pairs are halves in another order. */
static void rotate(const hfa_block_run *run, float *x, const float *angles, float *scratch) {
    const hfa_block *block = run->block;
    const hfa_kernels *kernels = block->rotates_once ? run->single : run->kernels;
    int64_t size = rotary_size(run), half = size / 2;
    float *halves = block->rotary == HFA_HALVES ? x : scratch + HFA_MAX_HEAD_DIM;
    for (int64_t i = 0; halves != x && i < half; i++) {
        halves[i] = x[2 * i];
        halves[half + i] = x[2 * i + 1];
    }
    kernels->rotate(halves, angles, angles + HFA_MAX_HEAD_DIM, size, scratch);
    if (block->rotates_once) run->kernels->round(halves, size);
    for (int64_t i = 0; halves != x && i < half; i++) {
        x[2 * i] = halves[i];
        x[2 * i + 1] = halves[half + i];
    }
}

/* Norm (where there is one that is not of the whole row) and rotary of query or key head number `head`, in place. */
static void prepare_head(const hfa_block_run *run, float *x, const hfa_norm *norm, int64_t head, float *angles) {
    const hfa_block *block = run->block;
    int has_norm = norm->kind && block->norm_extent != HFA_WHOLE_ROW;
    if (has_norm && !block->norms_after_rotary) norm_head(run, x, norm, head);
    if (block->rotary) rotate(run, x, angles, angles + 2 * HFA_MAX_HEAD_DIM);
    if (has_norm && block->norms_after_rotary) norm_head(run, x, norm, head);
}

/* cos and sin of token t as `rotate` wants them */
static void load_angles(const hfa_block_run *run, int64_t b, int64_t t, float *angles) {
    const hfa_block_call *call = run->call;
    const hfa_kernels *kernels = call->angles_are_f32 ? run->single : run->kernels;
    int64_t size = kernels->element, count = rotary_size(run), half = count / 2;
    if (!run->block->rotary) return;
    if (run->block->rotary == HFA_PAIRS_OF_HALVES) count = half;
    b += run->sequence, t += run->token;
    if (call->angles_at) b = call->angles_at[b];
    kernels->load((const char *)call->cos + (b * call->cos_stride_b + t * call->cos_stride_t) * size, angles, count);
    kernels->load((const char *)call->sin + (b * call->sin_stride_b + t * call->sin_stride_t) * size, angles + HFA_MAX_HEAD_DIM, count);
    if (run->block->rotary == HFA_HALVES) return;
    for (float *to = angles; to <= angles + HFA_MAX_HEAD_DIM; to += HFA_MAX_HEAD_DIM) {
        for (int64_t i = 0; run->block->rotary == HFA_PAIRS && i < half; i++) to[i] = to[2 * i];
        memcpy(to + half, to, (size_t)half * sizeof(float));
    }
}

/* Where head i of group g lies among the projections of row r. */
static const float *projected_head(const hfa_block_run *run, const hfa_heads *heads, int64_t r, int64_t g, int64_t i) {
    return run->projected + r * run->projected_stride + heads->start + g * heads->stride + i * heads->step;
}

/* The key and value of token t of sequence b, whose row is `row`, kv head g; mine->angles are the token's. */
static void write_position(const hfa_block_run *run, hfa_block_private *mine, const hfa_row *row, int64_t b, int64_t g, int64_t t) {
    const hfa_block *block = run->block;
    int64_t d = block->head_dim, r = b * run->tokens + t;
    memcpy(mine->queries, projected_head(run, &block->k, r, g, 0), (size_t)d * sizeof(float));
    prepare_head(run, mine->queries, &block->k_norm, g, mine->angles);
    hfa_attend_write(&run->attention, mine->queries, 1, keys_at(run, row, g, row->past + t));
    memcpy(mine->queries, projected_head(run, &block->v, r, g, 0), (size_t)d * sizeof(float));
    if (block->v_norm.kind && block->norm_extent != HFA_WHOLE_ROW) norm_head(run, mine->queries, &block->v_norm, g);
    hfa_attend_write(&run->attention, mine->queries, 0, values_at(run, row, g, row->past + t));
}

static int writes(const hfa_block_run *run) { return run->block->k.start >= 0; }

/* The query of row r and head i of group g, to x [D]; mine->angles are the token's. */
static void prepare_query(const hfa_block_run *run, hfa_block_private *mine, int64_t r, int64_t g, int64_t i, float *x) {
    const hfa_block *block = run->block;
    memcpy(x, projected_head(run, &block->q, r, g, i), (size_t)block->head_dim * sizeof(float));
    prepare_head(run, x, &block->q_norm, g * (block->heads / block->kv_heads) + i, mine->angles);
}

void hfa_attention_prepare(const hfa_block_run *run, hfa_block_private *mine, int64_t r) {
    int64_t d = run->block->head_dim, heads = run->block->heads, group = heads / run->block->kv_heads, size = run->kernels->element;
    hfa_row row = row_of(run, r / run->tokens);
    load_angles(run, r / run->tokens, r % run->tokens, mine->angles);
    for (int64_t g = 0; writes(run) && g < run->block->kv_heads; g++) write_position(run, mine, &row, r / run->tokens, g, r % run->tokens);
    for (int64_t h = 0; h < heads; h++) {
        prepare_query(run, mine, r, h / group, h % group, mine->queries);
        run->kernels->store(mine->queries, run->query + (r * heads + h) * d * size, d);
    }
}

void hfa_attention_gate(const hfa_block_run *run, float *attended, int64_t r) {
    const hfa_block *block = run->block;
    int64_t d = block->head_dim, group = block->heads / block->kv_heads;
    if (block->output_gate.start < 0) return;
    for (int64_t h = 0; h < block->heads; h++) {
        const float *gate = projected_head(run, &block->output_gate, r, h / group, h % group);
        run->kernels->gate(HFA_SIGMOID, gate, attended + h * d, d, attended + h * d);
    }
}

/* Where the mask of token t begins, in elements. */
static int64_t mask_at(const hfa_block_run *run, int64_t b, int64_t t) {
    return (run->sequence + b) * run->call->mask_stride_b + (run->token + t) * run->call->mask_stride_t;
}

/* scores [n] of query token t of sequence b, whose row is `row`, against positions from.. : hide what the mask or causality hides */
static void apply_mask(const hfa_block_run *run, float *scores, int64_t n, int64_t from, const hfa_row *row, int64_t b, int64_t t) {
    const hfa_block_call *call = run->call;
    int64_t at = mask_at(run, b, t) + from - call->first;
    if (call->mask_kind == HFA_MASK_NONE) {
        int64_t visible = row->past + t + 1 - from;
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

int hfa_attention_refuses(const hfa_block_run *run) {
    const hfa_block_call *call = run->call;
    if (!run->is_prompt) return 0;
    if (call->row_past || call->mask_kind == HFA_MASK_ADD) return 1;
    /* a pass that ends before the call's last token: what it would hide must be hidden by the mask, too */
    int64_t columns = call->past + call->tokens - call->first, beyond = call->tokens - run->token - run->tokens;
    for (int64_t b = 0; b < run->batch && beyond && call->mask_kind; b++)
        for (int64_t t = 0; t < run->tokens; t++)
            if (memchr((const uint8_t *)call->mask + mask_at(run, b, t) + columns - beyond, 1, (size_t)beyond)) return 1;
    return 0;
}

/* Whether a bool mask says no more than causality and left padding: then run->starts says it, and the rest need not be read. */
static int is_left_padding(const hfa_block_run *run, int64_t before) {
    for (int64_t b = 0; b < run->batch; b++) {
        const uint8_t *last = (const uint8_t *)run->call->mask + mask_at(run, b, run->tokens - 1);
        const uint8_t *seen = memchr(last, 1, (size_t)(before + run->tokens));
        int64_t start = run->starts[b] = seen ? seen - last : before + run->tokens;
        for (int64_t t = 0; t < run->tokens; t++) {
            const uint8_t *mask = (const uint8_t *)run->call->mask + mask_at(run, b, t);
            int64_t end = before + t + 1, hidden = start < end ? start : end;
            if (memchr(mask, 1, (size_t)hidden) || memchr(mask + hidden, 0, (size_t)(end - hidden))
                || memchr(mask + end, 1, (size_t)(run->tokens - t - 1)))
                return 0;
        }
    }
    return 1;
}

int hfa_attention_of_prompt(hfa_block_run *run) {
    const hfa_block *block = run->block;
    const hfa_block_call *call = run->call;
    hfa_row row = row_of(run, 0);
    int64_t d = block->head_dim, width = block->heads * d, before = row.past - row.first;
    int is_plain = !call->mask_kind || is_left_padding(run, before);
    hfa_prompt_call prompt = {
        .query = run->query, .out = run->attended, .totals = run->totals, .sinks = run->sinks, .slopes = block->slopes, .dtype = block->dtype, .format = call->format, .batch = run->batch,
        .keys = keys_at(run, &row, 0, row.first), .tokens = run->tokens, .heads = block->heads,
        .values = values_at(run, &row, 0, row.first), .kv_heads = block->kv_heads, .key_dim = d, .value_dim = d,
        .mask = is_plain ? NULL : (const uint8_t *)call->mask + mask_at(run, 0, 0), .is_causal = is_plain,
        .starts = is_plain && call->mask_kind ? run->starts : NULL, .past = before, .positions = before + run->tokens,
        .threads = run->threads, .query_stride_b = run->tokens * width, .query_stride_h = d, .query_stride_t = width,
        .key_stride_b = call->key_stride_b, .key_stride_g = call->key_stride_g, .key_stride_s = call->key_stride_s,
        .value_stride_b = call->value_stride_b, .value_stride_g = call->value_stride_g, .value_stride_s = call->value_stride_s,
        .mask_stride_b = call->mask_stride_b, .mask_stride_t = call->mask_stride_t, .scale = block->scale, .softcap = block->softcap};
    int status = hfa_prompt(&prompt);
    for (int64_t i = 0; i < run->rows * block->heads; i++) /* -inf: it sees nothing, or its scores are not finite */
        if (!(run->totals[i] < INFINITY) || (!call->mask_kind && run->totals[i] == -INFINITY)) run->is_strange = 1;
    return status;
}

/* Queries q0.. of a sequence and kv head, normed, rotated and packed; query i is head i % group of token i / group. */
static void prepare_queries(const hfa_block_run *run, hfa_block_private *mine, int64_t b, int64_t g, int64_t q0, int count) {
    int64_t d = run->block->head_dim, group = run->block->heads / run->block->kv_heads, loaded = -1;
    for (int i = 0; i < count; i++) {
        int64_t t = (q0 + i) / group;
        if (t != loaded) load_angles(run, b, loaded = t, mine->angles);
        prepare_query(run, mine, b * run->tokens + t, g, (q0 + i) % group, mine->queries + i * d);
    }
    hfa_attend_pack(&run->attention, mine->queries, count, &mine->room);
}

/* The n positions of a row from `from` on for queries q0..q0+count, which are packed: partials as hfa_attend_weigh leaves them. */
static void attend_piece(hfa_block_run *run, hfa_block_private *mine, const hfa_row *row, int64_t b, int64_t g, int64_t from, int64_t n,
                         int64_t q0, int count, float *partial, float *max, float *sum) {
    int64_t group = run->block->heads / run->block->kv_heads;
    if (!hfa_attend_score(&run->attention, keys_at(run, row, g, from), row->key_stride_s, n, count, &mine->room))
        run->is_strange = 1;
    for (int i = 0; run->block->slopes && i < count; i++) {
        float slope = run->block->slopes[g * group + (q0 + i) % group], *scores = mine->room.scores + i * HFA_PIECE;
        for (int64_t j = 0; j < n; j++) scores[j] += slope * (float)(from + j);
    }
    for (int i = 0; i < count; i++) apply_mask(run, mine->room.scores + i * HFA_PIECE, n, from, row, b, (q0 + i) / group);
    hfa_attend_weigh(&run->attention, values_at(run, row, g, from), row->value_stride_s, n, count, &mine->room, partial, max, sum);
}

/* One query over all pieces, whose partials lie `step` queries apart, and its sink or NULL. A query that sees nothing gives zero, as
 * torch's sdpa does. */
static void merge(const hfa_block_run *run, const float *partial, const float *max, const float *sum, const float *sink, int64_t step,
                  int64_t pieces, float *head) {
    int64_t d = run->block->head_dim;
    float top = -INFINITY, total = 0.0f;
    memset(head, 0, (size_t)d * sizeof(float));
    for (int64_t p = 0; p < pieces; p++) top = max[p * step] > top || max[p * step] != max[p * step] ? max[p * step] : top;
    if (top == -INFINITY) return;
    if (sink) {
        top = *sink > top ? *sink : top;
        total = expf(*sink - top);
    }
    for (int64_t p = 0; p < pieces; p++) total += sum[p * step] * expf(max[p * step] - top);
    for (int64_t p = 0; p < pieces; p++) {
        float weight = expf(max[p * step] - top) / total;
        run->single->axpy(partial + p * step * d, d, 1, d, &weight, 1, 1, head, d);
    }
    run->kernels->round(head, d);
}

static void attend(hfa_block_run *run, hfa_block_private *mine, int64_t task) {
    const hfa_block *block = run->block;
    int64_t d = block->head_dim, queries = run->queries, b = sequence_of(run, task), pieces = pieces_of(run, b), own = task - run->tasks[b];
    int64_t g = own / pieces, head = b * block->kv_heads + g;
    hfa_row row = row_of(run, b);
    int64_t past = row.past, from = (row.first / HFA_PIECE + own % pieces) * HFA_PIECE, to = from + HFA_PIECE;
    if (from < row.first) from = row.first;
    if (to > past + run->tokens) to = past + run->tokens;
    for (int64_t at = from > past ? from : past; writes(run) && at < to; at++) {
        load_angles(run, b, at - past, mine->angles);
        write_position(run, mine, &row, b, g, at - past);
    }
    for (int64_t q0 = 0; q0 < queries; q0 += HFA_QUERY_GROUP) {
        int count = (int)(queries - q0 < HFA_QUERY_GROUP ? queries - q0 : HFA_QUERY_GROUP);
        if (mine->ready != head || queries > HFA_QUERY_GROUP) prepare_queries(run, mine, b, g, q0, count);
        mine->ready = head;
        int64_t first = task * queries + q0;
        attend_piece(run, mine, &row, b, g, from, to - from, q0, count, run->partial + first * d, run->partial_max + first, run->partial_sum + first);
    }
}

void hfa_attention_run(hfa_block_run *run, hfa_block_private *mine, int self) {
    for (int64_t task; (task = hfa_ranges_take(run->ranges[1], run->threads, self)) >= 0;) attend(run, mine, task);
}

void hfa_attention_merge(const hfa_block_run *run, int64_t r, float *out) {
    const hfa_block *block = run->block;
    int64_t d = block->head_dim, group = block->heads / block->kv_heads, b = r / run->tokens, pieces = pieces_of(run, b);
    for (int64_t h = 0; h < block->heads; h++) {
        int64_t first = (run->tasks[b] + h / group * pieces) * run->queries + r % run->tokens * group + h % group;
        merge(run, run->partial + first * d, run->partial_max + first, run->partial_sum + first, run->sinks ? run->sinks + h : NULL,
              run->queries, pieces, out + h * d);
    }
    hfa_attention_gate(run, out, r);
}
