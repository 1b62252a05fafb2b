/* Exponentials, hyperbolic tangents and error functions of fp32 vectors; included once per instruction set. */

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

/* exp for weights of a softmax, a <= 0. Below HFA_LEAST it is 0, which no sum shows beside the weight 1 that each softmax has: subnormal
 * numbers, which sharp attention is full of, cost a hundred cycles wherever they are made or multiplied. */
#define HFA_LEAST (-60.0f)
HFA_INLINE vf vf_weight(vf a) {
    vf least = vf_set1(HFA_LEAST);
    return vf_select_lt(a, least, vf_set1(0.0f), vf_exp(vf_max(least, a)));
}

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

/* erf: an odd rational function that is 1 to the last bits from 4 on (Eigen's, eigen.tuxfamily.org, generic_fast_erf); within 4 ulp.
 * The clamps keep NaN. */
HFA_INLINE vf vf_erf(vf a) {
    vf x = vf_min(vf_set1(4.0f), vf_max(vf_set1(-4.0f), a));
    vf z = vf_mul(x, x), p = vf_set1(-2.72614225801306e-10f), q = vf_set1(-1.45660718464996e-5f);
    p = vf_fma(p, z, vf_set1(2.77068142495902e-8f));
    p = vf_fma(p, z, vf_set1(-2.10102402082508e-6f));
    p = vf_fma(p, z, vf_set1(-5.69250639462346e-5f));
    p = vf_fma(p, z, vf_set1(-7.34990630326855e-4f));
    p = vf_fma(p, z, vf_set1(-2.95459980854025e-3f));
    p = vf_fma(p, z, vf_set1(-1.60960333262415e-2f));
    q = vf_fma(q, z, vf_set1(-2.13374055278905e-4f));
    q = vf_fma(q, z, vf_set1(-1.68282697438203e-3f));
    q = vf_fma(q, z, vf_set1(-7.37332916720468e-3f));
    q = vf_fma(q, z, vf_set1(-1.42647390514189e-2f));
    return vf_div(vf_mul(p, x), q);
}
