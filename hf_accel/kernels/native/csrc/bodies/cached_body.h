/* Scores and weighted sums over rows of a quantized cache (cached.h); included once per instruction set by isa_body.h.
 * Products are summed exactly in integers, so that they are the same on every machine. */
#include "drivers/cached.h"

#define CACHED_AHEAD 4096 /* bytes */

#ifdef VW_AVX
/* out[0..3]: sums of four vectors each */
HFA_INLINE void sums4(__m256i a, __m256i b, __m256i c, __m256i d, float *out) {
    __m256i t = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1));
    _mm_storeu_ps(out, _mm_cvtepi32_ps(s));
}
/* Four rows against M <= 2 queries, out[m * ldo + r]. Tiles of two rows and four queries convert codes half as often and
 * were no faster. */
#define DEFINE_ROWS8(M)                                                                                               \
    HFA_INLINE void rows8_##M(const uint8_t *row, int64_t stride, int64_t d, const int16_t *q, int64_t ldq, float *out, int64_t ldo) { \
        __m256i sum[M][4];                                                                                            \
        for (int m = 0; m < M; m++) for (int r = 0; r < 4; r++) sum[m][r] = _mm256_setzero_si256();                   \
        for (int64_t i = 0; i < d; i += 16) {                                                                         \
            __m256i codes[4];                                                                                         \
            for (int r = 0; r < 4; r++) codes[r] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(row + r * stride + i))); \
            for (int m = 0; m < M; m++) {                                                                             \
                __m256i x = _mm256_loadu_si256((const __m256i *)(q + m * ldq + i));                                   \
                for (int r = 0; r < 4; r++) sum[m][r] = _mm256_add_epi32(sum[m][r], _mm256_madd_epi16(codes[r], x));  \
            }                                                                                                         \
        }                                                                                                             \
        for (int m = 0; m < M; m++) sums4(sum[m][0], sum[m][1], sum[m][2], sum[m][3], out + m * ldo);                 \
    }
DEFINE_ROWS8(1)
DEFINE_ROWS8(2)
/* 16 bytes are 16 codes of the first half of a head and 16 of the second; products of 15 * 127 fit 8 times in 16 bits */
#define DEFINE_ROWS4(M)                                                                                               \
    HFA_INLINE void rows4_##M(const uint8_t *row, int64_t stride, int64_t half, const int8_t *q, int64_t ldq, float *out, int64_t ldo) { \
        const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);                                         \
        __m256i sum[M][4];                                                                                            \
        for (int m = 0; m < M; m++) for (int r = 0; r < 4; r++) sum[m][r] = _mm256_setzero_si256();                   \
        for (int64_t i = 0; i < half; i += 16) {                                                                      \
            __m256i codes[4];                                                                                         \
            for (int r = 0; r < 4; r++) {                                                                             \
                __m128i packed = _mm_loadu_si128((const __m128i *)(row + r * stride + i));                            \
                codes[r] = _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1), low); \
            }                                                                                                         \
            for (int m = 0; m < M; m++) {                                                                             \
                __m256i x = _mm256_loadu_si256((const __m256i *)(q + m * ldq + 2 * i));                               \
                for (int r = 0; r < 4; r++) sum[m][r] = _mm256_add_epi16(sum[m][r], _mm256_maddubs_epi16(codes[r], x)); \
            }                                                                                                         \
        }                                                                                                             \
        for (int m = 0; m < M; m++)                                                                                   \
            sums4(_mm256_madd_epi16(sum[m][0], one), _mm256_madd_epi16(sum[m][1], one),                               \
                  _mm256_madd_epi16(sum[m][2], one), _mm256_madd_epi16(sum[m][3], one), out + m * ldo);               \
    }
DEFINE_ROWS4(1)
DEFINE_ROWS4(2)
#endif

static float cached_product(int64_t format, const uint8_t *row, int64_t d, const char *q, int64_t from) {
    int32_t sum = 0;
    if (format == HFA_INT8) {
        const int16_t *x = (const int16_t *)(const void *)q;
        for (int64_t i = from; i < d; i++) sum += (int32_t)(int8_t)row[i] * x[i];
    } else {
        int64_t half = d / 2, whole = half / 16 * 16;
        for (int64_t i = from; i < half; i++) {
            int64_t at = i < whole ? i / 16 * 32 + i % 16 : 2 * whole + i % 16, beside = i < whole ? 16 : half % 16;
            sum += (row[i] & 15) * (int32_t)(int8_t)q[at] + (row[i] >> 4) * (int32_t)(int8_t)q[at + beside];
        }
    }
    return (float)sum;
}

/* scores out[m * ldo + n], n < rows */
static void dot_cached(int64_t format, const void *rows, int64_t stride, int64_t n, int64_t d, const void *packed, int m, float *out,
                       int64_t ldo) {
    hfa_cached_queries q = hfa_cached_queries_at((void *)(uintptr_t)packed, format, m, d);
    float scales[HFA_PIECE], minima[HFA_PIECE];
    const uint8_t *row = rows;
    int64_t done = 0;
    hfa_cached_scales(format, rows, stride, n, d, scales, minima);
#ifdef VW_AVX
    int64_t bytes = hfa_code_bytes(format, d), whole = bytes / 16 * 16, elements = q.stride / 2;
    for (; whole && done + 4 <= n; done += 4) {
        const uint8_t *at = row + done * stride;
        for (int64_t ahead = 0; ahead < 4 * stride; ahead += 64) __builtin_prefetch(at + CACHED_AHEAD + ahead, 0, HFA_PREFETCH_LEVEL);
        for (int i = 0; i < m; i += 2) {
            float *to = out + i * ldo + done;
            const char *x = q.codes + i * q.stride;
            if (format == HFA_INT8) {
                if (i + 1 < m) rows8_2(at, stride, whole, (const int16_t *)(const void *)x, elements, to, ldo);
                else rows8_1(at, stride, whole, (const int16_t *)(const void *)x, elements, to, ldo);
            } else {
                if (i + 1 < m) rows4_2(at, stride, whole, (const int8_t *)x, q.stride, to, ldo);
                else rows4_1(at, stride, whole, (const int8_t *)x, q.stride, to, ldo);
            }
        }
        if (whole < bytes) /* the sums are below 2^31 and their parts exact only as integers: heads of such sizes are small */
            for (int i = 0; i < m; i++)
                for (int r = 0; r < 4; r++)
                    out[i * ldo + done + r] = cached_product(format, at + r * stride, d, q.codes + i * q.stride, 0);
    }
#endif
    for (; done < n; done++)
        for (int i = 0; i < m; i++) out[i * ldo + done] = cached_product(format, row + done * stride, d, q.codes + i * q.stride, 0);
    for (int i = 0; i < m; i++) {
        float *to = out + i * ldo, scale = q.scale[i], sum = q.sum[i];
        if (format == HFA_INT8)
            for (int64_t j = 0; j < n; j++) to[j] = to[j] * scales[j] * scale;
        else
            for (int64_t j = 0; j < n; j++) to[j] = (to[j] * scales[j] + minima[j] * sum) * scale;
    }
}

#ifdef VW_AVX
/* 2 W vectors of columns against M queries, W M = 4: eight sums, as many as hide the latency of the one before. Vectors w
 * are columns 16 w and 16 w + 8 of int8; of int4 columns 8 w and the same bytes' other halves. In 16-bit integers, pairs of
 * positions at a time, it was no faster. */
#define DEFINE_COLUMNS(M, W)                                                                                          \
    HFA_INLINE void columns_##M##_##W(int64_t format, const uint8_t *row, int64_t stride, int64_t n, int64_t half, int begins, \
                                      const float *coef, int64_t ldc, float *out, int64_t ldo) {                      \
        int64_t step = format == HFA_INT8 ? 16 : 8, beside = format == HFA_INT8 ? 8 : half;                           \
        __m256 sum[M][2 * W];                                                                                         \
        for (int i = 0; i < M; i++)                                                                                   \
            for (int v = 0; v < 2 * W; v++) sum[i][v] = _mm256_loadu_ps(out + i * ldo + v / 2 * step + v % 2 * beside); \
        for (int64_t j = 0; j < n; j++, row += stride) {                                                              \
            if (begins) __builtin_prefetch(row + CACHED_AHEAD, 0, HFA_PREFETCH_LEVEL);                                \
            for (int w = 0; w < W; w++) {                                                                             \
                __m256 x, y;                                                                                          \
                if (format == HFA_INT8) {                                                                             \
                    x = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(row + 16 * w))));   \
                    y = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(row + 16 * w + 8)))); \
                } else {                                                                                              \
                    __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(row + 8 * w)));             \
                    x = _mm256_cvtepi32_ps(_mm256_and_si256(wide, _mm256_set1_epi32(15)));                            \
                    y = _mm256_cvtepi32_ps(_mm256_srli_epi32(wide, 4));                                               \
                }                                                                                                     \
                for (int i = 0; i < M; i++) {                                                                         \
                    __m256 by = _mm256_broadcast_ss(coef + i * ldc + j);                                              \
                    sum[i][2 * w] = _mm256_fmadd_ps(x, by, sum[i][2 * w]);                                            \
                    sum[i][2 * w + 1] = _mm256_fmadd_ps(y, by, sum[i][2 * w + 1]);                                    \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
        for (int i = 0; i < M; i++)                                                                                   \
            for (int v = 0; v < 2 * W; v++) _mm256_storeu_ps(out + i * ldo + v / 2 * step + v % 2 * beside, sum[i][v]); \
    }
DEFINE_COLUMNS(1, 1)
DEFINE_COLUMNS(1, 4)
DEFINE_COLUMNS(2, 1)
DEFINE_COLUMNS(2, 2)
DEFINE_COLUMNS(4, 1)
/* all columns that fill vectors, for M queries; returns the bytes of a row that they are in */
#define COLUMNS(M, W)                                                                                                 \
    do {                                                                                                              \
        int64_t at = 0, each = format == HFA_INT8 ? 16 : 8;                                                           \
        for (; at + W * each <= bytes; at += W * each)                                                                \
            columns_##M##_##W(format, row + at, stride, n, d / 2, !i && !at, coef + i * ldc, ldc, out + i * ldo + at, ldo); \
        for (; at + each <= bytes; at += each)                                                                        \
            columns_##M##_1(format, row + at, stride, n, d / 2, !i && !at, coef + i * ldc, ldc, out + i * ldo + at, ldo); \
    } while (0)
#endif

/* out[m * ldo + c] += sum_n coef[m * ldc + n] * code[n, c]; coef already has the scales in it */
static void axpy_cached(int64_t format, const void *rows, int64_t stride, int64_t n, int64_t d, const float *coef, int64_t ldc, int m,
                        float *out, int64_t ldo) {
    int64_t bytes = hfa_code_bytes(format, d), whole = 0;
#ifdef VW_AVX
    const uint8_t *row = rows;
    int i = 0;
    for (; i + 4 <= m; i += 4) COLUMNS(4, 1);
    for (; i + 2 <= m; i += 2) COLUMNS(2, 2);
    if (i < m) COLUMNS(1, 4);
    whole = format == HFA_INT8 ? bytes / 16 * 16 : bytes / 8 * 8;
#endif
    if (whole == bytes) return;
    for (int q = 0; q < m; q++)
        for (int64_t j = 0; j < n; j++) {
            const uint8_t *at = (const uint8_t *)rows + j * stride;
            float by = coef[q * ldc + j], *to = out + q * ldo;
            if (format == HFA_INT8)
                for (int64_t c = whole; c < d; c++) to[c] += by * (float)(int8_t)at[c];
            else
                for (int64_t c = whole; c < bytes; c++) {
                    to[c] += by * (float)(at[c] & 15);
                    to[d / 2 + c] += by * (float)(at[c] >> 4);
                }
        }
}
