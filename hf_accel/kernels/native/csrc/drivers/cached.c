/* Rows of a quantized cache: rounding, Hadamard rotation (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4), queries. */
#include <math.h>
#include <string.h>
#include "drivers/cached.h"

static uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
static uint16_t bf16_up(float x) { return (uint16_t)((bits_of(x) + (x > 0.0f ? 0xffffu : 0u)) >> 16); } /* x >= 0 or NaN */
static uint16_t bf16_down(float x) { return (uint16_t)((bits_of(x) + (x < 0.0f ? 0xffffu : 0u)) >> 16); }
static float from_bf16(uint16_t u) { return float_of((uint32_t)u << 16); }
/* to the nearest integer, ties to even, for |x| < 2^22: the same in every instruction set */
static int32_t nearest(float x) { return (int32_t)(bits_of(x + 12582912.0f) - 0x4b400000u); }
static float inverse(float scale) { return scale > 0.0f && 1.0f / scale <= 3.0e38f ? 1.0f / scale : 0.0f; }
static float within(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

void hfa_rotate_head(float *x, int64_t d) {
    int64_t size = d & -d;
    float scale = (float)(1.0 / sqrt((double)size));
    for (int64_t half = 1; half < size; half *= 2)
        for (int64_t i = 0; i < d; i += 2 * half)
            for (int64_t j = i; j < i + half; j++) {
                float a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
    for (int64_t i = 0; i < d; i++) x[i] *= scale;
}

static float largest(const float *x, int64_t d) { /* NaN if any value is not finite */
    float most = 0.0f, strange = 0.0f;
    for (int64_t i = 0; i < d; i++) {
        float a = fabsf(x[i]);
        most = a > most ? a : most;
        strange += x[i] * 0.0f;
    }
    return most + strange;
}

void hfa_cached_write(int64_t format, float *x, int64_t d, int is_key, void *row) {
    uint8_t *codes = row;
    if (format == HFA_INT8) {
        uint16_t scale = bf16_up(largest(x, d) / 127.0f);
        float by = inverse(from_bf16(scale));
        for (int64_t i = 0; i < d; i++) codes[i] = (uint8_t)(int8_t)nearest(within(x[i] * by, -127.0f, 127.0f));
        memcpy(codes + d, &scale, 2);
        return;
    }
    if (is_key) hfa_rotate_head(x, d);
    float low = INFINITY, high = -INFINITY, strange = largest(x, d) * 0.0f;
    for (int64_t i = 0; i < d; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    uint16_t ends[2];
    ends[1] = bf16_down(low + strange);
    float start = from_bf16(ends[1]);
    ends[0] = bf16_up((high - start) / 15.0f + strange);
    float by = inverse(from_bf16(ends[0]));
    for (int64_t i = 0; i < d / 2; i++) {
        int32_t a = nearest(within((x[i] - start) * by, 0.0f, 15.0f)), b = nearest(within((x[d / 2 + i] - start) * by, 0.0f, 15.0f));
        codes[i] = (uint8_t)((a & 15) | (b & 15) << 4);
    }
    memcpy(codes + d / 2, ends, 4);
}

void hfa_cached_pack(int64_t format, float *queries, int count, int64_t d, void *packed) {
    hfa_cached_queries q = hfa_cached_queries_at(packed, format, count, d);
    float top = format == HFA_INT8 ? 32767.0f : 127.0f;
    for (int m = 0; m < count; m++) {
        float *x = queries + m * d;
        if (format == HFA_INT4) hfa_rotate_head(x, d);
        float most = largest(x, d), by = inverse(most / top), sum = 0.0f;
        char *codes = q.codes + m * q.stride;
        memset(codes, 0, (size_t)q.stride);
        for (int64_t i = 0; i < d; i++) {
            int32_t code = nearest(within(x[i] * by, -top, top));
            if (format == HFA_INT8) {
                int16_t c = (int16_t)code;
                memcpy(codes + 2 * i, &c, 2);
            } else {
                /* as the codes lie once their halves are apart: 16 of the first half of a head, 16 of the second */
                int64_t half = d / 2, j = i % half, at = j / 16 * 32 + (i >= half ? 16 : 0) + j % 16;
                if (j >= half / 16 * 16) at = half / 16 * 32 + (i >= half ? half % 16 : 0) + j % 16;
                codes[at] = (char)code;
                sum += (float)code;
            }
        }
        q.scale[m] = by > 0.0f ? most / top : most * 0.0f; /* NaN stays */
        q.sum[m] = sum;
    }
}

void hfa_cached_scales(int64_t format, const void *rows, int64_t stride, int64_t n, int64_t d, float *scales, float *minima) {
    const char *at = (const char *)rows + hfa_code_bytes(format, d);
    for (int64_t i = 0; i < n; i++, at += stride) {
        uint16_t ends[2];
        memcpy(ends, at, format == HFA_INT8 ? 2 : 4);
        scales[i] = from_bf16(ends[0]);
        if (format == HFA_INT4) minima[i] = from_bf16(ends[1]);
    }
}
