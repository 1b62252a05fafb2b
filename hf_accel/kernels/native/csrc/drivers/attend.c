/* One piece of attention: scores, softmax and weighted values, over K and V of the dtype or over rows of codes. */
#include <math.h>
#include <string.h>
#include "drivers/attend.h"
#include "drivers/cached.h"

static size_t queries_bytes(const hfa_attention *a) {
    return a->format == HFA_DENSE ? hfa_packed_bytes(a->kernels, HFA_QUERY_GROUP, a->key_dim)
                                  : hfa_cached_queries_bytes(HFA_QUERY_GROUP, a->key_dim);
}

size_t hfa_attend_bytes(const hfa_attention *a) {
    return queries_bytes(a) + HFA_QUERY_GROUP * HFA_PIECE * sizeof(float);
}

void hfa_attend_lay_out(const hfa_attention *a, char *memory, hfa_attend_room *room) {
    room->scores = (float *)(void *)memory;
    room->queries = memory + HFA_QUERY_GROUP * HFA_PIECE * sizeof(float);
    (void)a;
}

void hfa_attend_write(const hfa_attention *a, float *x, int is_key, void *to) {
    int64_t d = is_key ? a->key_dim : a->value_dim;
    if (a->format == HFA_DENSE) a->kernels->store(x, to, d);
    else hfa_cached_write(a->format, x, d, is_key, to);
}

void hfa_attend_pack(const hfa_attention *a, float *queries, int count, const hfa_attend_room *room) {
    if (a->format == HFA_DENSE) a->kernels->pack_f32(queries, a->key_dim, count, a->key_dim, room->queries);
    else hfa_cached_pack(a->format, queries, count, a->key_dim, room->queries);
}

int hfa_attend_score(const hfa_attention *a, const void *keys, int64_t stride, int64_t n, int count, const hfa_attend_room *room) {
    if (a->format == HFA_DENSE)
        a->kernels->dot(keys, stride, n, a->key_dim, room->queries, count, room->scores, HFA_PIECE);
    else
        a->kernels->dot_cached(a->format, keys, stride, n, a->key_dim, room->queries, count, room->scores, HFA_PIECE);
    float strange = 0.0f;
    for (int i = 0; i < count; i++) strange += a->kernels->scale_scores(room->scores + i * HFA_PIECE, n, a->scale, a->softcap);
    return strange == 0.0f;
}

/* Scales go into the weights; what the minima of int4 add is the same for all columns of a query. */
static void weigh_codes(const hfa_attention *a, const void *values, int64_t stride, int64_t n, int count, float *weights, float *out) {
    float scales[HFA_PIECE], minima[HFA_PIECE];
    hfa_cached_scales(a->format, values, stride, n, a->value_dim, scales, minima);
    for (int i = 0; i < count; i++) {
        float *weight = weights + i * HFA_PIECE, shift = 0.0f, part[8] = {0}; /* eight sums: the compiler may not reorder one */
        if (a->format == HFA_INT4) {
            for (int64_t j = n; j < (n + 7) / 8 * 8; j++) weight[j] = minima[j] = 0.0f;
            for (int64_t j = 0; j < n; j += 8)
                for (int l = 0; l < 8; l++) part[l] += weight[j + l] * minima[j + l];
            for (int l = 0; l < 8; l++) shift += part[l];
        }
        for (int64_t j = 0; j < n; j++) weight[j] *= scales[j];
        for (int64_t c = 0; c < a->value_dim; c++) out[i * a->value_dim + c] = shift;
    }
    a->kernels->axpy_cached(a->format, values, stride, n, a->value_dim, weights, HFA_PIECE, count, out, a->value_dim);
}

static int has_nan(const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (x[i] != x[i]) return 1;
    return 0;
}

void hfa_attend_weigh(const hfa_attention *a, const void *values, int64_t stride, int64_t n, int count,
                      const hfa_attend_room *room, float *out, float *max, float *sum) {
    int64_t padded = (n + 15) / 16 * 16;
    for (int i = 0; i < count; i++) {
        float *scores = room->scores + i * HFA_PIECE;
        for (int64_t j = n; j < padded; j++) scores[j] = -INFINITY; /* whole vectors: no tail with other rounding */
        max[i] = a->kernels->maximum(scores, padded);
        sum[i] = 0.0f;
        if (max[i] == -INFINITY && has_nan(scores, n)) max[i] = NAN; /* comparisons lose it */
        if (max[i] == -INFINITY) memset(scores, 0, (size_t)n * sizeof(float)); /* nothing visible here */
        else sum[i] = a->kernels->exponentials(scores, padded, max[i]);
    }
    if (a->format != HFA_DENSE) {
        weigh_codes(a, values, stride, n, count, room->scores, out);
        return;
    }
    memset(out, 0, (size_t)(count * a->value_dim) * sizeof(float));
    a->kernels->axpy(values, stride, n, a->value_dim, room->scores, HFA_PIECE, count, out, a->value_dim);
}
