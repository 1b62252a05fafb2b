/* Attention of many queries, tile by tile (FlashAttention, Dao et al. 2022, arXiv:2205.14135, algorithm 1; the softmax as it
 * goes on: Milakov and Gimelshein 2018, arXiv:1805.02867).
 *
 * A task is some rows of one row of the batch and one kv head: a row is a query, those of all heads of the group beside each
 * other. It takes keys and values a stretch at a time, made ready once for all its blocks of queries. Stretches begin at
 * multiples of HFA_STRETCH, whoever computes them: so what a query is given depends on nothing but itself and what it sees. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "drivers/cached.h"
#include "threads.h"

#define MAX_BLOCK 64
#define MOST_BYTES (640 << 10) /* of queries and sums of a task: they stay in L2 */

typedef struct { int64_t head, first, count, cost; } task;

typedef struct {
    const hfa_prompt_call *call;
    const hfa_kernels *kernels;
    const hfa_prompt_kernels *inner;
    int64_t group, rows;          /* of a task, at most; whole blocks */
    int64_t words, depth, columns; /* of a packed query; elements of a staged key; of sums, whole sixteens */
    float scale, sign;
    const task *tasks; int64_t count;
    hfa_range *next;
    char *memory; size_t bytes; /* of a thread */
} run;

/* What a thread works with. queries [blocks][words][block], sums [blocks][columns][block]; max, sum [rows];
 * first, last: limits of a block's queries; keys [stretch][depth], values: see hfa_prompt_kernels; scores, weights [span][block]. */
typedef struct {
    char *queries, *keys, *values;
    float *sums, *max, *sum, *scores, *weights, *hidden, *line, *keep, *first, *last;
} room;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

static size_t lay_out(const run *r, char *memory, room *m) {
    size_t at = 0, block = (size_t)r->inner->block, rows = (size_t)r->rows, widest = (size_t)most(r->call->key_dim, r->columns);
    size_t line = block * (size_t)most((int64_t)widest, HFA_SPAN);
#define PLACE(field, size) do { if (m) m->field = (void *)(memory + at); at += ((size_t)(size) + 63) / 64 * 64; } while (0)
    PLACE(queries, rows * (size_t)r->words * 4);
    PLACE(sums, rows * (size_t)r->columns * 4);
    PLACE(max, rows * 4);
    PLACE(sum, rows * 4);
    PLACE(scores, HFA_SPAN * block * 4);
    PLACE(weights, HFA_SPAN * block * 4);
    PLACE(hidden, HFA_SPAN * block * 4);
    PLACE(keys, (size_t)(HFA_STRETCH * r->depth * 4));
    PLACE(values, (size_t)(HFA_STRETCH * r->columns * 4));
    PLACE(line, line * 4);
    PLACE(keep, block * 4);
    PLACE(first, block * 4);
    PLACE(last, block * 4);
#undef PLACE
    return at;
}

/* The columns that query t of row b may see are [from, to), the mask aside. */
static void limits(const hfa_prompt_call *call, int64_t b, int64_t t, int64_t *from, int64_t *to) {
    int64_t at = call->past + t;
    *from = most(call->starts ? call->starts[b] : 0, call->window > 0 ? at - call->window + 1 : 0);
    *from = most(*from, 0);
    *to = call->is_causal ? least(at + 1, call->positions) : call->positions;
}

/* The columns that any of the rows [first, first + count) may see. */
static void reach(const run *r, int64_t head, int64_t first, int64_t count, int64_t *from, int64_t *to) {
    int64_t unused, b = head / r->call->kv_heads;
    limits(r->call, b, first / r->group, from, &unused);
    limits(r->call, b, (first + count - 1) / r->group, &unused, to);
}

static void pack(const run *r, const task *t, const room *m) {
    const hfa_prompt_call *call = r->call;
    int64_t b = t->head / call->kv_heads, g = t->head % call->kv_heads, block = r->inner->block, d = call->key_dim;
    for (int64_t from = 0; from < t->count; from += block) {
        char *to = m->queries + from * r->words * 4;
        memset(m->line, 0, (size_t)(block * r->words * 4));
        for (int64_t i = 0; i < least(block, t->count - from); i++) {
            int64_t row = t->first + from + i, h = g * r->group + row % r->group;
            const char *query = (const char *)call->query
                + (b * call->query_stride_b + h * call->query_stride_h + row / r->group * call->query_stride_t) * r->kernels->element;
            float x[HFA_MAX_HEAD_DIM];
            r->kernels->load(query, x, d);
            if (call->format == HFA_INT4) hfa_rotate_head(x, d); /* keys are turned: scores do not change when queries turn, too */
            for (int64_t c = 0; r->sign != 1.0f && c < d; c++) x[c] *= r->sign;
            if (r->inner->pairs) r->kernels->store(x, m->line + i * r->words, d);
            else memcpy(m->line + i * r->words, x, (size_t)d * 4);
        }
        r->inner->transpose(m->line, r->words, block, r->words, to, block);
    }
}

/* What a stretch is read from: keys with a stride in bytes; values as `weigh` wants them, from column `at`. */
typedef struct { const char *keys, *values; int64_t key_stride, value_stride; } stage;

/* n positions from `rows` on as operands with `depth` elements a row, as they are or decoded; missing elements are zero */
static void stage_rows(const run *r, const char *rows, int64_t stride, int64_t n, int64_t d, int64_t depth, char *to) {
    int64_t size = r->inner->pairs ? 2 : 4;
    if (r->call->format != HFA_DENSE) {
        if (r->inner->pairs) r->inner->read_codes_bf16(r->call->format, rows, stride, n, d, (uint16_t *)(void *)to, depth);
        else r->inner->read_codes(r->call->format, rows, stride, n, d, (float *)(void *)to, depth);
        return;
    }
    for (int64_t j = 0; j < n; j++, rows += stride, to += depth * size) {
        if (r->inner->pairs) memcpy(to, rows, (size_t)d * 2);
        else r->kernels->load(rows, (float *)(void *)to, d);
        if (depth > d) memset(to + d * size, 0, (size_t)((depth - d) * size));
    }
}

/* Positions [from, to) of the stretch at column `at`; `to` may go beyond the last, up to a whole strip. */
static stage make_ready(const run *r, const task *t, int64_t at, int64_t from, int64_t to, const room *m) {
    const hfa_prompt_call *call = r->call;
    int64_t b = t->head / call->kv_heads, g = t->head % call->kv_heads, is_dense = call->format == HFA_DENSE;
    int64_t each = is_dense ? r->kernels->element : 1, n = least(to, call->positions - at) - from;
    int64_t key_stride = call->key_stride_s * each, value_stride = call->value_stride_s * each;
    const char *keys = (const char *)call->keys + (b * call->key_stride_b + g * call->key_stride_g) * each + at * key_stride;
    const char *values = (const char *)call->values + (b * call->value_stride_b + g * call->value_stride_g) * each + at * value_stride;
    int as_they_are = is_dense && r->kernels->element == (r->inner->pairs ? 2 : 4);
    stage s = {keys, values, key_stride, value_stride};
    if (!as_they_are || call->key_dim != r->depth || n < to - from) {
        int64_t line = r->depth * (r->inner->pairs ? 2 : 4);
        stage_rows(r, keys + from * key_stride, key_stride, n, call->key_dim, r->depth, m->keys + from * line);
        memset(m->keys + (from + n) * line, 0, (size_t)((to - from - n) * line));
        s.keys = m->keys;
        s.key_stride = line;
    }
    if (r->inner->pairs) {
        for (int64_t j = from; j < from + n; j += HFA_STRIP) {
            int64_t count = least(HFA_STRIP, from + n - j), stride = value_stride;
            const char *rows = values + j * value_stride;
            if (!is_dense) {
                stage_rows(r, rows, value_stride, count, call->value_dim, call->value_dim, (char *)m->line);
                rows = (const char *)m->line;
                stride = call->value_dim * 2;
            }
            r->inner->pair_values(rows, stride, count, call->value_dim, m->values + j / HFA_STRIP * r->columns * 64);
        }
        s.values = m->values;
        s.value_stride = r->columns;
    } else if (!as_they_are) {
        stage_rows(r, values + from * value_stride, value_stride, n, call->value_dim, call->value_dim, m->values + from * call->value_dim * 4);
        s.values = m->values;
        s.value_stride = call->value_dim * 4;
    }
    return s;
}

/* Positions [from, from + n) of the stretch at `at` that the mask hides from a block's rows, to m->hidden. Returns 0 where it
 * hides none, -1 where it hides all, else 1. */
static int hide(const run *r, const task *t, int64_t first, int64_t count, int64_t at, int64_t n, const room *m) {
    const hfa_prompt_call *call = r->call;
    int64_t b = t->head / call->kv_heads, g = t->head % call->kv_heads, block = r->inner->block, inside = least(n, call->positions - at);
    int some = 0, all = 1;
    for (int64_t i = 0; i < block; i++) {
        float *line = m->line + i * n;
        if (i >= count) {
            memset(line, 0, (size_t)n * 4);
            continue;
        }
        int64_t row = first + i, h = g * r->group + row % r->group;
        const uint8_t *mask = (const uint8_t *)call->mask + b * call->mask_stride_b + h * call->mask_stride_h + row / r->group * call->mask_stride_t + at;
        some |= memchr(mask, 0, (size_t)inside) != NULL;
        all &= memchr(mask, 1, (size_t)inside) == NULL;
        for (int64_t j = 0; j < inside; j++) line[j] = (float)mask[j] - 1.0f;
        for (int64_t j = inside; j < n; j++) line[j] = -1.0f;
    }
    if (all) return -1;
    if (some) r->inner->transpose(m->line, n, block, n, m->hidden, block);
    return some;
}

/* What slopes add to a block's scores [n][block] of positions from column `at` on, before they are scaled. */
static void lean(const run *r, const task *t, int64_t first, int64_t count, int64_t at, int64_t n, float *scores) {
    int64_t g = t->head % r->call->kv_heads, block = r->inner->block;
    float slopes[MAX_BLOCK];
    for (int64_t i = 0; i < block; i++) slopes[i] = r->call->slopes[g * r->group + (first + least(i, count - 1)) % r->group] / r->scale;
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < block; i++) scores[j * block + i] += slopes[i] * (float)(at + j);
}

/* The block of the task's row `row`: positions [low, high) of the stretch at column `at`. */
static void attend_span(const run *r, const task *t, int64_t row, int64_t at, int64_t low, int64_t high, const stage *ready, const room *m) {
    const hfa_prompt_call *call = r->call;
    const hfa_prompt_kernels *inner = r->inner;
    int64_t first = t->first + row, count = least(inner->block, t->count - row), n = high - low;
    int is_cut = 0, is_masked = call->mask ? hide(r, t, first, count, at + low, n, m) : 0;
    if (is_masked < 0) return; /* it hides all */
    for (int64_t i = 0; i < inner->block; i++) {
        int64_t from, to;
        limits(call, t->head / call->kv_heads, (first + least(i, count - 1)) / r->group, &from, &to);
        m->first[i] = (float)most(from - at - low, 0);
        m->last[i] = (float)most(least(to - at - low, n) - 1, -1);
        is_cut |= from > at + low || to < at + high;
    }
    inner->scores(ready->keys + low * ready->key_stride, ready->key_stride, n, r->words, m->queries + row * r->words * 4, m->scores);
    if (call->slopes) lean(r, t, first, count, at + low, n, m->scores);
    inner->softmax(m->scores, n, r->scale, (float)call->softcap, is_cut ? m->first : NULL, m->last, is_masked ? m->hidden : NULL,
                   m->max + row, m->sum + row, m->keep, m->weights);
    const char *values = ready->values + (inner->pairs ? low / HFA_STRIP * r->columns * 64 : low * ready->value_stride);
    inner->weigh(values, ready->value_stride, n, inner->pairs ? r->columns : call->value_dim, m->weights, m->keep, m->sums + row * r->columns);
}

/* The same over all positions that a query of the block sees, of those below `to` of the stretch. */
static void attend_block(const run *r, const task *t, int64_t row, int64_t at, int64_t to, const stage *ready, const room *m) {
    int64_t low, high;
    reach(r, t->head, t->first + row, least(r->inner->block, t->count - row), &low, &high);
    low = most(low - at, 0) / HFA_STRIP * HFA_STRIP;
    high = least(r->inner->pairs ? up_to(high - at, HFA_STRIP) : high - at, to);
    for (int64_t next; low < high; low = next) {
        next = least((low / HFA_SPAN + 1) * HFA_SPAN, high);
        attend_span(r, t, row, at, low, next, ready, m);
    }
}

static void finish(const run *r, const task *t, const room *m) {
    const hfa_prompt_call *call = r->call;
    int64_t b = t->head / call->kv_heads, g = t->head % call->kv_heads, block = r->inner->block, d = call->value_dim;
    float scale = call->softcap > 0.0 ? 1.0f : r->scale;
    for (int64_t from = 0; from < t->count; from += block) {
        int64_t count = least(block, t->count - from);
        memset(m->keep, 0, (size_t)block * 4);
        for (int64_t i = 0; i < count; i++) {
            int64_t row = t->first + from + i, h = g * r->group + row % r->group;
            float top = m->max[from + i] * scale, sum = m->sum[from + i];
            if (call->totals) call->totals[(b * call->tokens + row / r->group) * call->heads + h] = sum == 0.0f ? -INFINITY : top + logf(sum);
            if (sum == 0.0f) continue; /* it saw nothing */
            m->keep[i] = 1.0f / sum;
            if (call->sinks) {
                float sink = call->sinks[h], highest = sink > top ? sink : top, own = expf(top - highest);
                m->keep[i] = own / (sum * own + expf(sink - highest));
            }
        }
        float *sums = m->sums + from * r->columns;
        r->inner->weigh(NULL, 0, 0, r->columns, NULL, m->keep, sums); /* nothing more: sums times 1 / sum of weights */
        r->inner->transpose(sums, block, r->columns, block, m->line, r->columns);
        for (int64_t i = 0; i < count; i++) {
            int64_t row = t->first + from + i, to = (b * call->tokens + row / r->group) * call->heads + g * r->group + row % r->group;
            float *values = m->line + i * r->columns;
            if (m->sum[from + i] == 0.0f) memset(values, 0, (size_t)d * 4); /* a hidden NaN times nothing */
            if (call->is_f32) memcpy((float *)call->out + to * d, values, (size_t)d * 4);
            else r->kernels->store(values, (char *)call->out + to * d * r->kernels->element, d);
        }
    }
}

static void attend_rows(const run *r, const task *t, const room *m) {
    int64_t low, high, block = r->inner->block, rows = up_to(t->count, block);
    reach(r, t->head, t->first, t->count, &low, &high);
    pack(r, t, m);
    memset(m->sums, 0, (size_t)(rows * r->columns) * 4);
    memset(m->sum, 0, (size_t)rows * 4);
    for (int64_t i = 0; i < rows; i++) m->max[i] = -INFINITY;
    for (int64_t at = low / HFA_STRETCH * HFA_STRETCH; at < high; at += HFA_STRETCH) {
        int64_t from = most(low - at, 0) / HFA_STRIP * HFA_STRIP, to = least(high - at, HFA_STRETCH);
        if (r->inner->pairs) to = up_to(to, HFA_STRIP);
        stage s = make_ready(r, t, at, from, to, m);
        for (int64_t row = 0; row < t->count; row += block) attend_block(r, t, row, at, to, &s, m);
    }
    finish(r, t, m);
}

static void prompt_task(void *arg, int self, int team) {
    run *r = arg;
    room m;
    (void)team;
    lay_out(r, r->memory + r->bytes * (size_t)self, &m);
    if (r->inner->begin) r->inner->begin();
    for (int64_t i; (i = hfa_ranges_take(r->next, 1, 0)) >= 0;) attend_rows(r, r->tasks + i, &m);
    if (r->inner->end) r->inner->end();
}

static int longest_first(const void *one, const void *other) {
    const task *a = one, *b = other;
    if (a->cost != b->cost) return a->cost < b->cost ? 1 : -1;
    return a->head != b->head ? (a->head < b->head ? -1 : 1) : a->first < b->first ? -1 : 1;
}

/* Whether so many tasks are too few: each makes ready what it reads, so that they are as large as they can be. */
static int is_uneven(const hfa_prompt_call *call, int64_t tasks, int64_t threads) {
    int64_t rounds = (tasks + threads - 1) / threads;
    int is_triangle = call->is_causal && call->tokens * 4 > call->positions; /* then tasks differ, and the last ones even them out */
    if (threads == 1) return 0;
    return rounds * threads * 8 > tasks * 9 || (is_triangle && rounds < 4);
}

int hfa_prompt(const hfa_prompt_call *call) {
    if (!call->query || !call->keys || !call->values || !call->out) return -1;
    if (call->batch < 1 || call->tokens < 1 || call->positions < 1 || (uint64_t)call->dtype >= HFA_DTYPES
        || (uint64_t)call->format >= HFA_CACHE_FORMATS || call->kv_heads < 1 || call->heads < 1 || call->heads % call->kv_heads
        || call->key_dim < 1 || call->value_dim < 1 || call->key_dim > HFA_MAX_HEAD_DIM || call->value_dim > HFA_MAX_HEAD_DIM)
        return -1;
    run r = {.call = call, .kernels = hfa_active_kernels((int)call->dtype), .group = call->heads / call->kv_heads};
    r.inner = r.kernels->prompt;
    r.sign = call->scale < 0.0 ? -1.0f : call->scale > 0.0 ? 1.0f : 0.0f;
    r.scale = call->scale == 0.0 ? 1.0f : (float)fabs(call->scale);
    r.depth = r.inner->pairs ? up_to(call->key_dim, 32) : call->key_dim;
    r.words = r.inner->pairs ? r.depth / 2 : r.depth;
    r.columns = r.inner->pairs ? up_to(call->value_dim, 16) : call->value_dim;
    int64_t threads = most(least(call->threads, HFA_MAX_THREADS), 1), block = r.inner->block;
    int64_t heads = call->batch * call->kv_heads, queries = r.group * call->tokens;
    int64_t widest = most(MOST_BYTES / ((r.words + r.columns) * 4) / block, 1);
    int64_t blocks = up_to(queries, block) / block, pieces = (blocks + widest - 1) / widest;
    while (pieces < blocks && is_uneven(call, heads * pieces, threads)) pieces++;
    r.rows = (blocks + pieces - 1) / pieces * block;
    pieces = (queries + r.rows - 1) / r.rows;
    r.bytes = (lay_out(&r, NULL, NULL) + 4095) / 4096 * 4096;
    r.count = heads * pieces;
    threads = least(threads, r.count);
    size_t shared = 64 + ((size_t)r.count * sizeof(task) + sizeof(hfa_range) + 4095) / 4096 * 4096;
    char *memory = hfa_more_scratch(shared + r.bytes * (size_t)threads + 4096);
    if (!memory) return -1;
    r.next = (hfa_range *)(void *)memory;
    task *tasks = (task *)(void *)(memory + sizeof(hfa_range));
    r.memory = memory + up_to((int64_t)shared, 4096);
    for (int64_t i = 0; i < r.count; i++) {
        task *t = tasks + i;
        int64_t from, to;
        t->head = i % heads;
        t->first = i / heads * r.rows;
        t->count = least(r.rows, queries - t->first);
        reach(&r, t->head, t->first, t->count, &from, &to);
        t->cost = most(to - from, 0) * t->count;
    }
    qsort(tasks, (size_t)r.count, sizeof(task), longest_first);
    r.tasks = tasks;
    hfa_ranges_deal(r.next, 1, r.count);
    hfa_parallel(prompt_task, &r, (int)threads);
    return 0;
}
