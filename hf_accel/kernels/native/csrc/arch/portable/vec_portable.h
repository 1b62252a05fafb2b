/* Four fp32 lanes in the compiler's own vector extension: any target; the reference for the other headers. */
#define VW 4
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vbits __attribute__((vector_size(16)));

HFA_INLINE vf vf_set1(float x) { return (vf){x, x, x, x}; }
HFA_INLINE vf vf_load(const float *p) { vf v; memcpy(&v, p, 16); return v; }
HFA_INLINE void vf_store(float *p, vf v) { memcpy(p, &v, 16); }
HFA_INLINE vf vf_add(vf a, vf b) { return a + b; }
HFA_INLINE vf vf_sub(vf a, vf b) { return a - b; }
HFA_INLINE vf vf_mul(vf a, vf b) { return a * b; }
HFA_INLINE vf vf_div(vf a, vf b) { return a / b; }
HFA_INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
HFA_INLINE vf vf_select_lt(vf a, vf b, vf x, vf y) { vbits m = a < b; return (vf)((m & (vbits)x) | (~m & (vbits)y)); }
HFA_INLINE vf vf_max(vf a, vf b) { return vf_select_lt(b, a, a, b); } /* b when either is NaN */
HFA_INLINE vf vf_min(vf a, vf b) { return vf_select_lt(a, b, a, b); }
HFA_INLINE vf vf_abs(vf a) { return (vf)((vbits)a & 0x7fffffff); }
HFA_INLINE vf vf_exp(vf a) { return (vf){expf(a[0]), expf(a[1]), expf(a[2]), expf(a[3])}; }
#define HFA_OWN_EXP
HFA_INLINE float vf_sum(vf a) { return (a[0] + a[1]) + (a[2] + a[3]); }
HFA_INLINE float vf_hmax(vf a) { float m = a[0]; for (int i = 1; i < 4; i++) m = a[i] > m ? a[i] : m; return m; }
HFA_INLINE void vf_sum4(vf a, vf b, vf c, vf d, float *out) {
    out[0] = vf_sum(a); out[1] = vf_sum(b); out[2] = vf_sum(c); out[3] = vf_sum(d);
}
HFA_INLINE vf vf_load_bf16(const uint16_t *p) { return (vf){bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])}; }
/* 2^(e - 127) of exponents of a byte, which are not 255; 2^-127 is subnormal and has no exponent of its own */
HFA_INLINE vf vf_load_exponents(const uint8_t *p) {
    float f[4];
    for (int i = 0; i < 4; i++) f[i] = hfa_float(p[i] ? (uint32_t)p[i] << 23 : 1u << 22);
    return vf_load(f);
}
HFA_INLINE vf vf_load_f16(const uint16_t *p) { return (vf){f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])}; }
HFA_INLINE void vf_store_bf16(uint16_t *p, vf v) { for (int i = 0; i < 4; i++) p[i] = f32_to_bf16(v[i]); }
HFA_INLINE void vf_store_f16(uint16_t *p, vf v) { for (int i = 0; i < 4; i++) p[i] = f32_to_f16(v[i]); }
/* 8 bf16 values as two vectors: the even and the odd elements */
HFA_INLINE void vf_pair_bf16(const uint16_t *p, vf *even, vf *odd) {
    vbits u; memcpy(&u, p, 16);
    *even = (vf)(u << 16);
    *odd = (vf)(u & (int32_t)0xffff0000u);
}
