/* Integer products of packed weights in plain C, four 32-bit lanes: one row of W each. */
typedef struct { union { int8_t b[16]; int16_t h[8]; int32_t w[4]; } u; } vi;
typedef vi v4; /* sums of int4 products: int32 per lane */
HFA_INLINE vi vi_load(const void *p) { vi v; memcpy(&v, p, 16); return v; }
HFA_INLINE vi vi_zero(void) { vi v; memset(&v, 0, sizeof v); return v; }
HFA_INLINE vi vi_repeat(const void *p) { vi v; for (int i = 0; i < 4; i++) memcpy(v.u.b + 4 * i, p, 4); return v; }
HFA_INLINE vi vi_right(vi a, const int n) { for (int i = 0; i < 16; i++) a.u.b[i] = (int8_t)((uint8_t)a.u.b[i] >> n); return a; }
HFA_INLINE vi vi_left(vi a, const int n) { for (int i = 0; i < 16; i++) a.u.b[i] = (int8_t)((uint8_t)a.u.b[i] << n); return a; }
HFA_INLINE vi vi_mask(vi a, const int bits) { for (int i = 0; i < 16; i++) a.u.b[i] = (int8_t)(a.u.b[i] & bits); return a; }
HFA_INLINE vi vi_mask_or(vi a, const int bits, vi b) { /* (a & bits) | b */
    for (int i = 0; i < 16; i++) a.u.b[i] = (int8_t)((a.u.b[i] & bits) | b.u.b[i]);
    return a;
}
HFA_INLINE v4 v4_begin(vi pairs) { v4 v; for (int i = 0; i < 4; i++) v.u.w[i] = pairs.u.h[2 * i] + pairs.u.h[2 * i + 1]; return v; }
HFA_INLINE v4 v4_dot(v4 sum, vi w, vi x) {
    for (int i = 0; i < 4; i++)
        sum.u.w[i] += w.u.b[4 * i] * x.u.b[4 * i] + w.u.b[4 * i + 1] * x.u.b[4 * i + 1]
                    + w.u.b[4 * i + 2] * x.u.b[4 * i + 2] + w.u.b[4 * i + 3] * x.u.b[4 * i + 3];
    return sum;
}
HFA_INLINE vf vi_float(vi a) { float f[4]; for (int i = 0; i < 4; i++) f[i] = (float)a.u.w[i]; return vf_load(f); }
HFA_INLINE vf v4_end(v4 sum) { return vi_float(sum); }
HFA_INLINE vi vi_load_int8(const void *p) { const int8_t *b = p; vi v; for (int i = 0; i < 8; i++) v.u.h[i] = b[i]; return v; }
HFA_INLINE vi vi_dot16(vi sum, vi w, vi x) {
    for (int i = 0; i < 4; i++) sum.u.w[i] += w.u.h[2 * i] * x.u.h[2 * i] + w.u.h[2 * i + 1] * x.u.h[2 * i + 1];
    return sum;
}
