/* The softmax of attention of many queries; included by prompt_body.h, and by isa_*.c with scores of their own, which may define
 * BETWEEN(j), what is to happen beside the positions j. */
#if PAIRS
/* 2^x; bf16 weights have 8 bits, and this is within 9e-5: a minimax polynomial over [0, 1) that is 1 at 0, so that -inf gives 0 */
HFA_INLINE vf rough_exp2(vf x) {
    vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vf p = vf_fma(vf_set1(0.0770672f), f, vf_set1(0.22764482f));
    p = vf_fma(p, f, vf_set1(0.69511682f));
    __mmask16 shows = _mm512_cmp_ps_mask(x, vf_set1(HFA_LEAST * 1.44269504f), _CMP_NLT_UQ); /* as in vf_weight; NaN stays */
    return _mm512_maskz_scalef_ps(shows, vf_fma(p, f, vf_set1(1.0f)), x);
}
/* rounded to nearest, ties away from zero: one instruction less than to even */
HFA_INLINE vf paired(vf even, vf odd) {
    __m512i half = _mm512_set1_epi32(0x8000);
    __m512i a = _mm512_add_epi32(_mm512_castps_si512(even), half), b = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(a, 16), b));
}
#endif

/* Scores [n][BLOCK] to weights exp(score - max) (in pairs: [n / 2][BLOCK], n even) and, of every query, the new maximum, the
 * new sum of weights and `keep`, by which what was summed before is to be multiplied. Not visible are positions outside of
 * first[query] .. last[query] (NULL: all are visible) and those where hidden[n][BLOCK] (or NULL) is below zero. scale > 0. */
static void ON(softmax)(float *scores, int64_t n, float scale, float softcap, const float *first, const float *last,
                        const float *hidden, float *max, float *sum, float *keep, void *packed) {
    float *weights = packed;
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
        vf grown = vf_sub(before, shift[v]); /* 0 where the maximum stays: then what was summed is kept to the last bit */
#if PAIRS
        vf k = vf_set1(scale * 1.44269504088896341f);
        vf_store(keep + v * VW, rough_exp2(vf_mul(grown, k)));
#else
        vf k = vf_set1(scale);
        vf_store(keep + v * VW, vf_weight(vf_mul(grown, k)));
#endif
        shift[v] = vf_mul(shift[v], k);
        total[0][v] = total[1][v] = zero;
    }
#if PAIRS
    vf k = vf_set1(scale * 1.44269504088896341f);
    for (int64_t j = 0; j < n; j += 2) {
#ifdef BETWEEN
        BETWEEN(j);
#endif
        UNROLL(4)
        for (int v = 0; v < PROMPT_VECTORS; v++) {
            vf a = rough_exp2(_mm512_fmsub_ps(vf_load(scores + j * BLOCK + v * VW), k, shift[v]));
            vf b = rough_exp2(_mm512_fmsub_ps(vf_load(scores + (j + 1) * BLOCK + v * VW), k, shift[v]));
            total[0][v] = vf_add(total[0][v], a);
            total[1][v] = vf_add(total[1][v], b);
            vf_store(weights + j / 2 * BLOCK + v * VW, paired(a, b));
        }
    }
#else
    vf k = vf_set1(scale);
    for (int64_t j = 0; j < n; j++)
        UNROLL(4)
        for (int v = 0; v < PROMPT_VECTORS; v++) {
            vf e = vf_weight(vf_sub(vf_mul(vf_load(scores + j * BLOCK + v * VW), k), shift[v]));
            total[j & 1][v] = vf_add(total[j & 1][v], e);
            vf_store(weights + j * BLOCK + v * VW, e);
        }
#endif
    for (int v = 0; v < PROMPT_VECTORS; v++) {
        float *to = sum + v * VW;
        vf_store(to, vf_fma(vf_load(to), vf_load(keep + v * VW), vf_add(total[0][v], total[1][v])));
    }
}
