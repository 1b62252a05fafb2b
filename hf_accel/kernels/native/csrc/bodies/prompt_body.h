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

#if PAIRS
/* 2^x; bf16 weights have 8 bits, and this is within 9e-5: a minimax polynomial over [0, 1) that is 1 at 0, so that -inf gives 0 */
HFA_INLINE vf rough_exp2(vf x) {
    vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vf p = vf_fma(vf_set1(0.0770672f), f, vf_set1(0.22764482f));
    p = vf_fma(p, f, vf_set1(0.69511682f));
    return _mm512_scalef_ps(vf_fma(p, f, vf_set1(1.0f)), x);
}
/* rounded to nearest, ties away from zero: one instruction less than to even */
HFA_INLINE vf paired(vf even, vf odd) {
    __m512i half = _mm512_set1_epi32(0x8000);
    __m512i a = _mm512_add_epi32(_mm512_castps_si512(even), half), b = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(a, 16), b));
}
#endif

/* Scores [n][BLOCK] to weights exp(score - max) in their place (in pairs: [n / 2][BLOCK], n even) and, of every query, the new
 * maximum, the new sum of weights and `keep`, by which what was summed before is to be multiplied. Not visible are positions
 * outside of first[query] .. last[query] (NULL: all are visible) and those where hidden[n][BLOCK] (or NULL) is below zero.
 * scale > 0. */
static void ON(softmax)(float *scores, int64_t n, float scale, float softcap, const float *first, const float *last,
                        const float *hidden, float *max, float *sum, float *keep) {
    vf none = vf_set1(-INFINITY), zero = vf_set1(0.0f);
    if (softcap > 0.0f) {
        vf cap = vf_set1(softcap), k = vf_set1(scale / softcap);
        for (int64_t i = 0; i < n * BLOCK; i += VW) vf_store(scores + i, vf_mul(cap, vf_tanh(vf_mul(vf_load(scores + i), k))));
        scale = 1.0f;
    }
    if (first || hidden)
        for (int64_t j = 0; j < n; j++)
            for (int v = 0; v < PROMPT_VECTORS; v++) {
                vf s = vf_load(scores + j * BLOCK + v * VW), at = vf_set1((float)j);
                if (first) {
                    s = vf_select_lt(at, vf_load(first + v * VW), none, s);
                    s = vf_select_lt(vf_load(last + v * VW), at, none, s);
                }
                if (hidden) s = vf_select_lt(vf_load(hidden + j * BLOCK + v * VW), zero, none, s);
                vf_store(scores + j * BLOCK + v * VW, s);
            }
    vf top[PROMPT_VECTORS], shift[PROMPT_VECTORS], total[2][PROMPT_VECTORS];
    for (int v = 0; v < PROMPT_VECTORS; v++) {
        vf part[4] = {none, none, none, none};
        int64_t j = 0;
        for (; j + 4 <= n; j += 4)
            for (int i = 0; i < 4; i++) part[i] = vf_max(part[i], vf_load(scores + (j + i) * BLOCK + v * VW));
        for (; j < n; j++) part[0] = vf_max(part[0], vf_load(scores + j * BLOCK + v * VW));
        vf before = vf_load(max + v * VW);
        top[v] = vf_max(before, vf_max(vf_max(part[0], part[1]), vf_max(part[2], part[3])));
        vf_store(max + v * VW, top[v]);
        /* nothing visible so far: whatever is subtracted from -inf */
        shift[v] = vf_select_lt(none, top[v], top[v], vf_select_lt(top[v], vf_set1(INFINITY), zero, top[v]));
#if PAIRS
        vf k = vf_set1(scale * 1.44269504088896341f);
        shift[v] = vf_mul(shift[v], k);
        vf_store(keep + v * VW, rough_exp2(vf_sub(vf_mul(before, k), shift[v])));
#else
        shift[v] = vf_mul(shift[v], vf_set1(scale));
        vf_store(keep + v * VW, vf_exp(vf_sub(vf_mul(before, vf_set1(scale)), shift[v])));
#endif
        total[0][v] = total[1][v] = zero;
    }
#if PAIRS
    vf k = vf_set1(scale * 1.44269504088896341f);
    for (int64_t j = 0; j < n; j += 2)
        UNROLL(4)
        for (int v = 0; v < PROMPT_VECTORS; v++) {
            vf a = rough_exp2(_mm512_fmsub_ps(vf_load(scores + j * BLOCK + v * VW), k, shift[v]));
            vf b = rough_exp2(_mm512_fmsub_ps(vf_load(scores + (j + 1) * BLOCK + v * VW), k, shift[v]));
            total[0][v] = vf_add(total[0][v], a);
            total[1][v] = vf_add(total[1][v], b);
            vf_store(scores + j / 2 * BLOCK + v * VW, paired(a, b));
        }
#else
    vf k = vf_set1(scale);
    for (int64_t j = 0; j < n; j++)
        UNROLL(4)
        for (int v = 0; v < PROMPT_VECTORS; v++) {
            vf e = vf_exp(vf_sub(vf_mul(vf_load(scores + j * BLOCK + v * VW), k), shift[v]));
            total[j & 1][v] = vf_add(total[j & 1][v], e);
            vf_store(scores + j * BLOCK + v * VW, e);
        }
#endif
    for (int v = 0; v < PROMPT_VECTORS; v++) {
        float *to = sum + v * VW;
        vf_store(to, vf_fma(vf_load(to), vf_load(keep + v * VW), vf_add(total[0][v], total[1][v])));
    }
}

static const hfa_prompt_kernels ON(prompt) = {.block = BLOCK, .pairs = PAIRS, .scores = ON(scores), .softmax = ON(softmax), .weigh = ON(weigh),
                                              .transpose = transpose_words, .read_codes = read_codes,
#if PAIRS
                                              .pair_values = pair_values,
#endif
};
#undef PAIRS
