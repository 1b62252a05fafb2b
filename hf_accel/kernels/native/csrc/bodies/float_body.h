/* Elementwise mathematics on fp32 vectors, the same for every dtype; included once per instruction set. */

#include "bodies/exp_body.h"

/* The tail goes through a padded vector: an element's result never depends on where
 * the end is. Returns 0, or NaN where a score is not finite. */
static float scale_scores(float *s, int64_t n, float scale, float softcap) {
    int64_t i = 0;
    vf k = vf_set1(scale), cap = vf_set1(softcap), zero = vf_set1(0.0f), strange = zero;
    for (; i + VW <= n; i += VW) {
        vf v = vf_mul(vf_load(s + i), k);
        strange = vf_fma(v, zero, strange);
        vf_store(s + i, softcap > 0 ? vf_mul(cap, vf_tanh(vf_div(v, cap))) : v);
    }
    if (i < n) {
        float tail[VW] = {0};
        memcpy(tail, s + i, (size_t)(n - i) * sizeof(float));
        vf v = vf_mul(vf_load(tail), k);
        strange = vf_fma(v, zero, strange);
        vf_store(tail, softcap > 0 ? vf_mul(cap, vf_tanh(vf_div(v, cap))) : v);
        memcpy(s + i, tail, (size_t)(n - i) * sizeof(float));
    }
    return vf_sum(strange);
}

static float maximum(const float *s, int64_t n) {
    float m = -INFINITY;
    int64_t i = 0;
    if (n >= VW) {
        vf v = vf_load(s);
        for (i = VW; i + VW <= n; i += VW) v = vf_max(v, vf_load(s + i));
        m = vf_hmax(v);
    }
    for (; i < n; i++) m = s[i] > m ? s[i] : m;
    return m;
}

static float exponentials(float *s, int64_t n, float top) {
    vf total = vf_set1(0.0f), shift = vf_set1(top);
    for (int64_t i = 0; i < n; i += VW) {
        vf e = vf_weight(vf_sub(vf_load(s + i), shift));
        vf_store(s + i, e);
        total = vf_add(total, e);
    }
    return vf_sum(total);
}
