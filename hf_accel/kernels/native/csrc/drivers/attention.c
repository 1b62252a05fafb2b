/* Attention over one part of a cache, merged into what earlier parts gave (Milakov and Gimelshein 2018, arXiv:1805.02867):
 * parts may lie anywhere and come one after the other. */
#include <math.h>
#include <string.h>
#include "drivers/attend.h"
#include "drivers/cached.h"
#include "drivers/product.h"

typedef struct {
    const hfa_attend_call *call;
    hfa_attention attention;
    int threads;
    int64_t pieces, queries; /* per task: group * T */
    hfa_range *ranges;
    float *partial, *max, *sum; /* [tasks, queries, Dv], [tasks, queries] */
    char *memory; size_t bytes; /* of a thread: queries [HFA_QUERY_GROUP, D], room */
} run;

static size_t up(size_t bytes) { return (bytes + 63) / 64 * 64; }

static void attend_task(const run *r, int64_t task, float *queries, const hfa_attend_room *room) {
    const hfa_attend_call *call = r->call;
    int64_t size = r->attention.kernels->element, each = hfa_attend_element(&r->attention), group = call->heads / call->kv_heads;
    int64_t head = task / r->pieces, b = head / call->kv_heads, g = head % call->kv_heads, from = task % r->pieces * HFA_PIECE;
    int64_t n = call->positions - from < HFA_PIECE ? call->positions - from : HFA_PIECE;
    const char *keys = (const char *)call->keys + (b * call->key_stride_b + g * call->key_stride_g + from * call->key_stride_s) * each;
    const char *values = (const char *)call->values + (b * call->value_stride_b + g * call->value_stride_g + from * call->value_stride_s) * each;
    for (int64_t q0 = 0; q0 < r->queries; q0 += HFA_QUERY_GROUP) {
        int count = (int)(r->queries - q0 < HFA_QUERY_GROUP ? r->queries - q0 : HFA_QUERY_GROUP);
        for (int i = 0; i < count; i++) {
            int64_t t = (q0 + i) / group, h = g * group + (q0 + i) % group;
            const char *query = (const char *)call->query + (b * call->query_stride_b + h * call->query_stride_h + t * call->query_stride_t) * size;
            r->attention.kernels->load(query, queries + i * call->key_dim, call->key_dim);
        }
        hfa_attend_pack(&r->attention, queries, count, room);
        hfa_attend_score(&r->attention, keys, call->key_stride_s, n, count, room);
        for (int i = 0; call->mask && i < count; i++) {
            int64_t t = (q0 + i) / group, h = g * group + (q0 + i) % group;
            const uint8_t *mask = (const uint8_t *)call->mask + b * call->mask_stride_b + h * call->mask_stride_h + t * call->mask_stride_t + from;
            float *scores = room->scores + i * HFA_PIECE;
            for (int64_t j = 0; j < n; j++) scores[j] = mask[j] ? scores[j] : -INFINITY;
        }
        int64_t first = task * r->queries + q0;
        hfa_attend_weigh(&r->attention, values, call->value_stride_s, n, count, room, r->partial + first * call->value_dim,
                         r->max + first, r->sum + first);
    }
}

static void attention_task(void *arg, int self, int team) {
    run *r = arg;
    char *memory = r->memory + r->bytes * (size_t)self;
    hfa_attend_room room;
    (void)team;
    hfa_attend_lay_out(&r->attention, memory + up((size_t)(HFA_QUERY_GROUP * r->call->key_dim) * sizeof(float)), &room);
    for (int64_t task; (task = hfa_ranges_take(r->ranges, r->threads, self)) >= 0;) attend_task(r, task, (float *)(void *)memory, &room);
}

/* into the state of query (b, h, t) the partial result `from` */
static void merge(const hfa_kernels *single, const hfa_attend_call *call, int64_t at, const float *partial, float max, float sum) {
    float *out = call->out + at * call->value_dim, before = call->max[at];
    if (max == -INFINITY) return;
    float top = max > before || max != max ? max : before, keep = before == -INFINITY ? 0.0f : expf(before - top), weight = expf(max - top);
    if (keep != 1.0f)
        for (int64_t c = 0; c < call->value_dim; c++) out[c] *= keep; /* a NaN stays */
    single->axpy(partial, call->value_dim, 1, call->value_dim, &weight, 1, 1, out, call->value_dim);
    call->sum[at] = call->sum[at] * keep + sum * weight;
    call->max[at] = top;
}

int hfa_attend(const hfa_attend_call *call) {
    if (!call->query || !call->keys || !call->values || !call->out || !call->max || !call->sum) return -1;
    if (call->batch < 1 || call->tokens < 1 || call->positions < 1 || (uint64_t)call->dtype >= HFA_DTYPES || (uint64_t)call->format >= HFA_CACHE_FORMATS
        || call->kv_heads < 1 || call->heads % call->kv_heads || call->key_dim > HFA_MAX_HEAD_DIM || call->value_dim > HFA_MAX_HEAD_DIM)
        return -1;
    run r = {.call = call};
    r.attention = (hfa_attention){.kernels = hfa_active_kernels((int)call->dtype), .format = call->format, .key_dim = call->key_dim,
                                  .value_dim = call->value_dim, .scale = (float)call->scale, .softcap = (float)call->softcap};
    const hfa_kernels *single = hfa_active_kernels(HFA_F32);
    int64_t group = call->heads / call->kv_heads;
    r.pieces = (call->positions + HFA_PIECE - 1) / HFA_PIECE;
    r.queries = group * call->tokens;
    int64_t heads = call->batch * call->kv_heads, tasks = heads * r.pieces, partials = tasks * r.queries;
    r.threads = hfa_useful_threads(heads * call->positions * (call->key_stride_s + call->value_stride_s) * hfa_attend_element(&r.attention), call->threads);
    r.bytes = (up((size_t)(HFA_QUERY_GROUP * call->key_dim) * sizeof(float)) + hfa_attend_bytes(&r.attention) + 4095) / 4096 * 4096;
    size_t shared = up(sizeof(hfa_range) * (size_t)r.threads) + up((size_t)(partials * call->value_dim) * 4) + 2 * up((size_t)partials * 4);
    char *memory = hfa_scratch(shared + 4096 + r.bytes * (size_t)r.threads);
    if (!memory) return -1;
    r.ranges = (hfa_range *)(void *)memory;
    r.partial = (float *)(void *)(memory + up(sizeof(hfa_range) * (size_t)r.threads));
    r.max = (float *)(void *)((char *)r.partial + up((size_t)(partials * call->value_dim) * 4));
    r.sum = (float *)(void *)((char *)r.max + up((size_t)partials * 4));
    r.memory = memory + (shared + 4095) / 4096 * 4096;
    hfa_ranges_deal(r.ranges, r.threads, tasks);
    hfa_parallel(attention_task, &r, r.threads);
    int64_t rows = call->batch * call->heads * call->tokens;
    if (call->fresh) {
        memset(call->out, 0, (size_t)(rows * call->value_dim) * sizeof(float));
        memset(call->sum, 0, (size_t)rows * sizeof(float));
        for (int64_t i = 0; i < rows; i++) call->max[i] = -INFINITY;
    }
    for (int64_t b = 0; b < call->batch; b++)
        for (int64_t h = 0; h < call->heads; h++)
            for (int64_t t = 0; t < call->tokens; t++)
                for (int64_t p = 0; p < r.pieces; p++) {
                    int64_t from = ((b * call->kv_heads + h / group) * r.pieces + p) * r.queries + t * group + h % group;
                    merge(single, call, (b * call->heads + h) * call->tokens + t, r.partial + from * call->value_dim, r.max[from], r.sum[from]);
                }
    return 0;
}

static void encode_task(void *arg, int self, int team) {
    const hfa_encode_call *call = arg;
    const hfa_kernels *kernels = hfa_active_kernels((int)call->dtype);
    float x[HFA_MAX_HEAD_DIM];
    int64_t rows = call->outer * call->inner;
    for (int64_t row = rows * self / team; row < rows * (self + 1) / team; row++) {
        int64_t o = row / call->inner, i = row % call->inner;
        kernels->load((const char *)call->x + (o * call->x_stride_o + i * call->x_stride_i) * kernels->element, x, call->d);
        hfa_cached_write(call->format, x, call->d, (int)call->is_key, (char *)call->rows + o * call->rows_stride_o + i * call->rows_stride_i);
    }
}

int hfa_encode(const hfa_encode_call *call) {
    if ((uint64_t)call->dtype >= HFA_DTYPES || (call->format != HFA_INT8 && call->format != HFA_INT4) || call->d < 1 || call->d > HFA_MAX_HEAD_DIM)
        return -1;
    if (call->outer > 0 && call->inner > 0 && (!call->x || !call->rows)) return -1;
    hfa_encode_call copy = *call;
    hfa_parallel(encode_task, &copy, hfa_useful_threads(call->outer * call->inner * call->d * 4, call->threads));
    return 0;
}
