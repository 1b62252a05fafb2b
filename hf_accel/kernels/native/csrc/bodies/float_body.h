/* Elementwise mathematics on fp32 vectors, the same for every dtype; included once per instruction set. */

#ifndef HFA_OWN_EXP
/* exp by 2^n * p(r), |r| <= ln2/2; polynomial of Cephes expf (netlib.org/cephes), within 2 ulp. The clamps keep NaN
 * (vf_max and vf_min return the second operand then), reach 0 below and infinity above. */
HFA_INLINE vf vf_exp(vf a) {
    vf x = vf_min(vf_set1(89.5f), vf_max(vf_set1(-110.0f), a));
    vf n = vf_round_int(vf_mul(x, vf_set1(1.44269504088896341f)));
    vf r = vf_fma(n, vf_set1(2.12194440e-4f), vf_fma(n, vf_set1(-0.693359375f), x));
    vf p = vf_set1(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set1(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set1(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set1(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set1(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set1(5.0000001201e-1f));
    p = vf_add(vf_fma(p, vf_mul(r, r), r), vf_set1(1.0f));
    return vf_ldexp(p, n);
}
#endif

/* tanh: odd polynomial of Cephes tanhf below 0.625, 1 - 2 / (exp(2x) + 1) beyond. */
HFA_INLINE vf vf_tanh(vf x) {
    vf z = vf_mul(x, x), p = vf_set1(-5.70498872745e-3f), one = vf_set1(1.0f);
    p = vf_fma(p, z, vf_set1(2.06390887954e-2f));
    p = vf_fma(p, z, vf_set1(-5.37397155531e-2f));
    p = vf_fma(p, z, vf_set1(1.33314422036e-1f));
    p = vf_fma(p, z, vf_set1(-3.33332819422e-1f));
    vf small = vf_fma(vf_mul(p, z), x, x);
    vf large = vf_sub(one, vf_div(vf_set1(2.0f), vf_add(vf_exp(vf_add(x, x)), one)));
    return vf_select_lt(vf_abs(x), vf_set1(0.625f), small, large);
}

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
        vf e = vf_exp(vf_sub(vf_load(s + i), shift));
        vf_store(s + i, e);
        total = vf_add(total, e);
    }
    return vf_sum(total);
}
