/* Inner kernels of attention of many queries (drivers/prompt.c), over operands of fp32 or, with PAIRS, of bf16 in pairs;
 * included once per kind of operand by isa_body.h.
 *
 * A query has a lane of its own, and HFA_BLOCK queries lie beside each other, PROMPT_VECTORS vectors of them: then maxima and
 * sums of exponentials need no step across lanes. Keys and values are the other operand, a number at a time for all lanes;
 * they are read where they lie. Operands are words of four bytes: an fp32 number, or two bf16 numbers of which both products
 * are added. Whatever queries and positions are computed together, each number is the same to the last bit. */
#undef ON
#undef MULTIPLY
#if PAIRS
#define ON(x) x##_pairs
#define MULTIPLY(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
#else
#define ON(x) x##_words
#define MULTIPLY(sum, a, b) vf_fma(a, b, sum)

#define BLOCK (PROMPT_VECTORS * VW)
#ifndef HFA_OWN_TRANSPOSE
HFA_INLINE void vf_transpose(vf *rows) {
    float in[VW][VW], out[VW];
    for (int r = 0; r < VW; r++) vf_store(in[r], rows[r]);
    for (int c = 0; c < VW; c++) {
        for (int r = 0; r < VW; r++) out[r] = in[r][c];
        rows[c] = vf_load(out);
    }
}
#endif

/* to[c][r] = from[r][c], words; strides in words */
static void transpose_words(const void *words, int64_t stride, int64_t rows, int64_t columns, void *out, int64_t to_stride) {
    const float *from = words;
    float *to = out;
    int64_t r = 0;
    for (; r + VW <= rows; r += VW) {
        int64_t c = 0;
        for (; c + VW <= columns; c += VW) {
            vf part[VW];
            UNROLL(16)
            for (int i = 0; i < VW; i++) part[i] = vf_load(from + (r + i) * stride + c);
            vf_transpose(part);
            UNROLL(16)
            for (int i = 0; i < VW; i++) vf_store(to + (c + i) * to_stride + r, part[i]);
        }
        for (; c < columns; c++)
            for (int i = 0; i < VW; i++) memcpy(to + c * to_stride + r + i, from + (r + i) * stride + c, 4);
    }
    for (; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) memcpy(to + c * to_stride + r, from + r * stride + c, 4);
}

/* rows of a quantized cache as fp32, keys as they are turned; see cached.h */
static void read_codes(int64_t format, const void *rows, int64_t stride, int64_t n, int64_t d, float *out, int64_t ldo) {
    float scale, least;
    for (int64_t j = 0; j < n; j++, out += ldo) {
        const uint8_t *row = (const uint8_t *)rows + j * stride;
        int64_t i = 0;
        hfa_cached_scales(format, row, stride, 1, d, &scale, &least);
        if (format == HFA_INT8) {
            const int8_t *codes = (const int8_t *)row;
#ifdef VW_AVX
            for (__m256 by = _mm256_set1_ps(scale); i + 8 <= d; i += 8)
                _mm256_storeu_ps(out + i, _mm256_mul_ps(by, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(codes + i))))));
#endif
            for (; i < d; i++) out[i] = (float)codes[i] * scale;
        } else {
#ifdef VW_AVX
            __m256 by = _mm256_set1_ps(scale), from = _mm256_set1_ps(least);
            for (; i + 8 <= d / 2; i += 8) {
                __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(row + i)));
                _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_and_si256(wide, _mm256_set1_epi32(15))), by), from));
                _mm256_storeu_ps(out + d / 2 + i, _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(wide, 4)), by), from));
            }
#endif
            for (; i < d / 2; i++) {
                float low = (float)(row[i] & 15) * scale, high = (float)(row[i] >> 4) * scale;
                out[i] = low + least;
                out[d / 2 + i] = high + least;
            }
        }
    }
}
#endif

/* sums [R][vectors] += over k < words of the word at a + r * row + k * step bytes, for all lanes, times b[k] */
HFA_INLINE void ON(multiply)(const int R, const char *a, int64_t row, int64_t step, int64_t words, const float *b,
                             vf sums[PROMPT_ROWS][PROMPT_VECTORS]) {
    for (int64_t k = 0; k < words; k++, a += step, b += BLOCK) {
        vf x[PROMPT_VECTORS];
        UNROLL(4)
        for (int v = 0; v < PROMPT_VECTORS; v++) x[v] = vf_load(b + v * VW);
        UNROLL(16)
        for (int r = 0; r < R; r++) {
            float word;
            memcpy(&word, a + r * row, 4);
            vf by = vf_set1(word);
            UNROLL(4)
            for (int v = 0; v < PROMPT_VECTORS; v++) sums[r][v] = MULTIPLY(sums[r][v], by, x[v]);
        }
    }
}

HFA_INLINE void ON(clear)(const int R, vf sums[PROMPT_ROWS][PROMPT_VECTORS]) {
    UNROLL(16)
    for (int r = 0; r < R; r++)
        UNROLL(4)
        for (int v = 0; v < PROMPT_VECTORS; v++) sums[r][v] = vf_set1(0.0f);
}

#define SCORES(R)                                                                                                     \
    do {                                                                                                              \
        vf sums[PROMPT_ROWS][PROMPT_VECTORS];                                                                         \
        ON(clear)(R, sums);                                                                                           \
        ON(multiply)(R, (const char *)keys + j * stride, stride, 4, words, queries, sums);                            \
        UNROLL(16)                                                                                                    \
        for (int r = 0; r < R; r++)                                                                                   \
            UNROLL(4)                                                                                                 \
            for (int v = 0; v < PROMPT_VECTORS; v++) vf_store(scores + (j + r) * BLOCK + v * VW, sums[r][v]);         \
    } while (0)

/* scores[j][query] of n keys with a stride in bytes; queries [words][BLOCK] */
static void ON(scores)(const void *keys, int64_t stride, int64_t n, int64_t words, const void *packed, float *scores) {
    const float *queries = packed;
    int64_t j = 0;
    for (; j + PROMPT_ROWS <= n; j += PROMPT_ROWS) SCORES(PROMPT_ROWS);
    for (; j < n; j++) SCORES(1);
}
#undef SCORES

#if PAIRS
/* n rows of a quantized cache as bf16 [n][ldo], keys as they are turned; elements beyond d are zero. Codes of four bits are looked
 * up in a table of what they stand for. */
static void read_codes_bf16(int64_t format, const void *rows, int64_t stride, int64_t n, int64_t d, uint16_t *out, int64_t ldo) {
    const uint8_t *row = rows;
    __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t j = 0; j < n; j++, row += stride, out += ldo) {
        uint16_t ends[2];
        int64_t bytes = hfa_code_bytes(format, d);
        memcpy(ends, row + bytes, format == HFA_INT8 ? 2 : 4);
        __m512 scale = _mm512_set1_ps(bf16_to_f32(ends[0]));
        __m512i table = _mm512_setzero_si512();
        if (format == HFA_INT4) {
            __m512 values = _mm512_add_ps(_mm512_mul_ps(numbers, scale), _mm512_set1_ps(bf16_to_f32(ends[1])));
            table = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(values));
        }
        for (int64_t i = 0; i < bytes; i += 32) {
            __mmask32 inside = bytes - i < 32 ? ((__mmask32)1 << (bytes - i)) - 1 : 0xffffffffu;
            __m256i codes = _mm256_maskz_loadu_epi8(inside, row + i);
            if (format == HFA_INT8) {
                __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
                __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
                _mm512_mask_storeu_epi16(out + i, inside, (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(b, scale), _mm512_mul_ps(a, scale)));
            } else {
                __m512i wide = _mm512_cvtepu8_epi16(codes); /* of an index, five bits count */
                __m512i low = _mm512_and_si512(wide, _mm512_set1_epi16(15)), high = _mm512_srli_epi16(wide, 4);
                _mm512_mask_storeu_epi16(out + i, inside, _mm512_permutexvar_epi16(low, table));
                _mm512_mask_storeu_epi16(out + d / 2 + i, inside, _mm512_permutexvar_epi16(high, table));
            }
        }
        if (ldo > d) memset(out + d, 0, (size_t)(ldo - d) * 2);
    }
}

/* n <= HFA_STRIP values [n][d] with a stride in bytes to [d][pairs of positions]; what is missing is zero */
static void pair_values(const void *values, int64_t stride, int64_t n, int64_t d, void *out) {
    const char *from = values;
    for (int64_t c = 0; c < d; c += 16) {
        __mmask16 inside = (__mmask16)(d - c < 16 ? (1u << (d - c)) - 1 : 0xffffu);
        vf rows[16];
        UNROLL(16)
        for (int p = 0; p < 16; p++) {
            const char *at = from + 2 * p * stride + c * 2;
            __m256i even = 2 * p < n ? _mm256_maskz_loadu_epi16(inside, at) : _mm256_setzero_si256();
            __m256i odd = 2 * p + 1 < n ? _mm256_maskz_loadu_epi16(inside, at + stride) : _mm256_setzero_si256();
            rows[p] = _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
        }
        vf_transpose(rows);
        UNROLL(16)
        for (int i = 0; i < 16; i++) vf_store((float *)out + (c + i) * 16, rows[i]);
    }
}
#define WEIGH(R)                                                                                                      \
    do {                                                                                                              \
        vf sums[PROMPT_ROWS][PROMPT_VECTORS];                                                                         \
        ON(clear)(R, sums);                                                                                           \
        for (int64_t j = 0; j < n; j += HFA_STRIP)                                                                    \
            ON(multiply)(R, (const char *)values + (j / HFA_STRIP * stride + c) * 64, 64, 4, HFA_STRIP / 2,           \
                         weights + j / 2 * BLOCK, sums);                                                              \
        ON(add_to)(R, sums, keep, out + c * BLOCK);                                                                   \
    } while (0)
#else
#define WEIGH(R)                                                                                                      \
    do {                                                                                                              \
        vf sums[PROMPT_ROWS][PROMPT_VECTORS];                                                                         \
        ON(clear)(R, sums);                                                                                           \
        ON(multiply)(R, (const char *)values + c * 4, 4, stride, n, weights, sums);                                   \
        ON(add_to)(R, sums, keep, out + c * BLOCK);                                                                   \
    } while (0)
#endif

HFA_INLINE void ON(add_to)(const int R, vf sums[PROMPT_ROWS][PROMPT_VECTORS], const float *keep, float *out) {
    UNROLL(16)
    for (int r = 0; r < R; r++)
        UNROLL(4)
        for (int v = 0; v < PROMPT_VECTORS; v++) {
            float *to = out + r * BLOCK + v * VW;
            vf_store(to, vf_fma(vf_load(to), vf_load(keep + v * VW), sums[r][v]));
        }
}

/* out[c][query] = out * keep + values weighted, c < d. Values of fp32: [n][d] with a stride in bytes; in pairs: strips as
 * pair_values makes them, `stride` rows of 64 bytes apart, and n whole strips. */
static void ON(weigh)(const void *values, int64_t stride, int64_t n, int64_t d, const void *packed, const float *keep, float *out) {
    const float *weights = packed;
    int64_t c = 0;
    for (; c + PROMPT_ROWS <= d; c += PROMPT_ROWS) WEIGH(PROMPT_ROWS);
    for (; c < d; c++) WEIGH(1);
}
#undef WEIGH

#include "bodies/softmax_body.h"

static const hfa_prompt_kernels ON(prompt) = {.block = BLOCK, .pairs = PAIRS, .scores = ON(scores), .softmax = ON(softmax), .weigh = ON(weigh),
                                              .transpose = transpose_words, .read_codes = read_codes,
#if PAIRS
                                              .pair_values = pair_values, .read_codes_bf16 = read_codes_bf16,
#endif
};
#undef PAIRS
