/* Keys and values in few bits: the rows of a quantized cache, how they are written, and how queries are made to meet them.
 *
 * A row is one position of one kv head, D values (shared with hf_accel/ops/cached.py, bit for bit):
 *   HFA_INT8  D int8, then a bf16 scale: x = scale * code
 *   HFA_INT4  D / 2 bytes, byte j with value j in its low and value D / 2 + j in its high half, then bf16 scale, bf16 minimum:
 *             x = scale * code + minimum. Keys are turned by a Hadamard matrix first (see hfa_rotate_head), values are not.
 * The scale is rounded up and the minimum down, so that no value lies outside; a row with a value that is not finite has the
 * scale NaN. Queries meet codes in integers: 16 bits against int8, 8 bits against int4, where the sums are exact. */
#ifndef HFA_CACHED_H
#define HFA_CACHED_H
#include "kernels.h"

static inline int64_t hfa_code_bytes(int64_t format, int64_t d) { return format == HFA_INT8 ? d : d / 2; }

/* `count` queries, rounded: codes [count][stride] bytes, then scale and sum of codes per query. */
typedef struct { char *codes; float *scale, *sum; int64_t stride; } hfa_cached_queries;

static inline hfa_cached_queries hfa_cached_queries_at(void *memory, int64_t format, int count, int64_t d) {
    hfa_cached_queries q = {.codes = (char *)memory, .stride = (d * (format == HFA_INT8 ? 2 : 1) + 31) / 32 * 32};
    q.scale = (float *)(q.codes + q.stride * count);
    q.sum = q.scale + count;
    return q;
}
static inline size_t hfa_cached_queries_bytes(int count, int64_t d) {
    return (size_t)(count * ((2 * d + 31) / 32 * 32) + count * 8 + 63) / 64 * 64;
}

/* In place; an orthonormal matrix that is its own inverse, in blocks of the largest power of two that divides d. */
void hfa_rotate_head(float *x, int64_t d);
/* x [d] to a row; x is changed when keys are rotated. */
void hfa_cached_write(int64_t format, float *x, int64_t d, int is_key, void *row);
/* queries [count][d] are changed when keys are rotated */
void hfa_cached_pack(int64_t format, float *queries, int count, int64_t d, void *packed);
/* scales and, for int4, minima of n rows as fp32 */
void hfa_cached_scales(int64_t format, const void *rows, int64_t stride, int64_t n, int64_t d, float *scales, float *minima);
#endif
