/* Four fp32 lanes: AArch64 Advanced SIMD. */
#define VW 4
typedef float32x4_t vf;

HFA_INLINE vf vf_set1(float x) { return vdupq_n_f32(x); }
HFA_INLINE vf vf_load(const float *p) { return vld1q_f32(p); }
HFA_INLINE void vf_store(float *p, vf v) { vst1q_f32(p, v); }
HFA_INLINE vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
HFA_INLINE vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
HFA_INLINE vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
HFA_INLINE vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
HFA_INLINE vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
HFA_INLINE vf vf_select_lt(vf a, vf b, vf x, vf y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
HFA_INLINE vf vf_max(vf a, vf b) { return vmaxq_f32(a, b); } /* NaN when either is NaN */
HFA_INLINE vf vf_min(vf a, vf b) { return vminq_f32(a, b); }
HFA_INLINE vf vf_abs(vf a) { return vabsq_f32(a); }
HFA_INLINE vf vf_round_int(vf a) { return vrndnq_f32(a); }
HFA_INLINE vf vf_ldexp(vf a, vf n) { /* two factors: see vec_avx2.h */
    int32x4_t i = vcvtq_s32_f32(n), h = vshrq_n_s32(i, 1), bias = vdupq_n_s32(127);
    vf f = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(h, bias), 23));
    vf g = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vsubq_s32(i, h), bias), 23));
    return vmulq_f32(vmulq_f32(a, f), g);
}
HFA_INLINE float vf_sum(vf a) { return vaddvq_f32(a); }
HFA_INLINE float vf_hmax(vf a) { return vmaxvq_f32(a); }
HFA_INLINE void vf_sum4(vf a, vf b, vf c, vf d, float *out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}
HFA_INLINE vf vf_load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
/* 2^(e - 127) of exponents of a byte, which are not 255; 2^-127 is subnormal and has no exponent of its own */
HFA_INLINE vf vf_load_exponents(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    uint32x4_t e = vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)))));
    return vreinterpretq_f32_u32(vmaxq_u32(vshlq_n_u32(e, 23), vdupq_n_u32(1u << 22)));
}
/* what stands in a table of 16 bytes for each of 16 bytes below 16 */
#define HFA_OWN_LOOKUP
HFA_INLINE int32x4_t vi_look(int32x4_t table, int32x4_t a) {
    return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table), vreinterpretq_u8_s32(a)));
}
HFA_INLINE vf vf_load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
HFA_INLINE void vf_store_bf16(uint16_t *p, vf v) {
    uint32x4_t u = vreinterpretq_u32_f32(v), hi = vshrq_n_u32(u, 16);
    uint32x4_t r = vshrq_n_u32(vaddq_u32(u, vaddq_u32(vandq_u32(hi, vdupq_n_u32(1)), vdupq_n_u32(0x7fff))), 16);
    vst1_u16(p, vmovn_u32(vbslq_u32(vceqq_f32(v, v), r, vorrq_u32(hi, vdupq_n_u32(0x40)))));
}
HFA_INLINE void vf_store_f16(uint16_t *p, vf v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
/* 8 bf16 values as two vectors: the even and the odd elements */
HFA_INLINE void vf_pair_bf16(const uint16_t *p, vf *even, vf *odd) {
    uint32x4_t u = vreinterpretq_u32_u16(vld1q_u16(p));
    *even = vreinterpretq_f32_u32(vshlq_n_u32(u, 16));
    *odd = vreinterpretq_f32_u32(vandq_u32(u, vdupq_n_u32(0xffff0000u)));
}
#ifdef HFA_DOT_BF16
/* Pairs of bf16 numbers as words, and sum + the products of both: vbfdotq rounds to odd between the steps, and subnormals count as zero. */
HFA_INLINE vf vf_load_pairs(const uint16_t *p) { return vreinterpretq_f32_u16(vld1q_u16(p)); }
HFA_INLINE vf vf_dot_pairs(vf sum, vf a, vf b) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
}
#endif

/* Integer products of packed weights: see vec_int.h. */
#define HFA_OWN_DOT
HFA_INLINE vf vi_float(int32x4_t a) { return vcvtq_f32_s32(a); }
/* eight, widened to 16 bits */
HFA_INLINE int32x4_t vi_load_int8(const void *p) { return vreinterpretq_s32_s16(vmovl_s8(vld1_s8((const int8_t *)p))); }
HFA_INLINE int32x4_t vi_dot16(int32x4_t sum, int32x4_t w, int32x4_t x) {
    int16x8_t a = vreinterpretq_s16_s32(w), b = vreinterpretq_s16_s32(x);
    return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
}
/* codes of fewer than 8 bits are below 128: the same with and without a sign */
HFA_INLINE int32x4_t v4_dot(int32x4_t sum, int32x4_t w, int32x4_t x) {
    int8x16_t a = vreinterpretq_s8_s32(w), b = vreinterpretq_s8_s32(x);
#ifdef HFA_DOT_INT8
    return vdotq_s32(sum, a, b);
#else /* two products of at most 24 * 127 fit 16 bits */
    return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)));
#endif
}
#ifdef HFA_MATRIX_INT8
/* Two rows of x at a time by smmla, which multiplies two rows of eight columns with two: sums of rows 0 and 1, 2 and 3 of W with both */
#define HFA_PAIRS_OF_ROWS
typedef struct { int32x4_t low, high; } v4_pair;
HFA_INLINE v4_pair v4_pair_begin(const int32_t *start) {
    int32x4_t both = vcombine_s32(vld1_s32(start), vld1_s32(start));
    return (v4_pair){both, both};
}
/* four rows of W, columns 0 to 3 and 4 to 7; x: eight columns of a row, then of the other */
HFA_INLINE v4_pair v4_pair_dot(v4_pair sum, int32x4_t first, int32x4_t second, const void *x) {
    int8x16_t b = vld1q_s8((const int8_t *)x);
    sum.low = vmmlaq_s32(sum.low, vreinterpretq_s8_s32(vzip1q_s32(first, second)), b);
    sum.high = vmmlaq_s32(sum.high, vreinterpretq_s8_s32(vzip2q_s32(first, second)), b);
    return sum;
}
HFA_INLINE int32x4_t v4_pair_row(v4_pair sum, const int row) {
    return row ? vuzp2q_s32(sum.low, sum.high) : vuzp1q_s32(sum.low, sum.high);
}
/* Codes of x of 16 bits are 256 times a byte with a sign and one without: eight columns of a row, then of the other. The codes of
 * two columns of both rows are at p, of the next two `step` bytes further. */
typedef struct { int8x16_t high; uint8x16_t low; } v8_codes;
HFA_INLINE v8_codes v8_codes_of(const char *p, int64_t step) {
    int32x4_t a = vcombine_s32(vld1_s32((const int32_t *)p), vld1_s32((const int32_t *)(p + step)));
    int32x4_t b = vcombine_s32(vld1_s32((const int32_t *)(p + 2 * step)), vld1_s32((const int32_t *)(p + 3 * step)));
    int8x16_t first = vreinterpretq_s8_s32(vuzp1q_s32(a, b)), second = vreinterpretq_s8_s32(vuzp2q_s32(a, b));
    return (v8_codes){vuzp2q_s8(first, second), vreinterpretq_u8_s8(vuzp1q_s8(first, second))};
}
/* Eight rows of W by eight columns, two columns of sixteen rows after the other: pairs of rows as smmla takes them */
HFA_INLINE void v8_rows(const char *p, int8x16_t pairs[4]) {
    int16x8_t c[4];
    UNROLL(4)
    for (int i = 0; i < 4; i++) c[i] = vreinterpretq_s16_s8(vld1q_s8((const int8_t *)p + i * 2 * HFA_LANES));
    int32x4_t a = vreinterpretq_s32_s16(vzip1q_s16(c[0], c[1])), b = vreinterpretq_s32_s16(vzip1q_s16(c[2], c[3]));
    pairs[0] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
    pairs[1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
    a = vreinterpretq_s32_s16(vzip2q_s16(c[0], c[1])), b = vreinterpretq_s32_s16(vzip2q_s16(c[2], c[3]));
    pairs[2] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
    pairs[3] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
}
HFA_INLINE int32x4_t v8_row(int32x4_t a, int32x4_t b, const int row) { /* of sums of two rows of x with rows 0, 1 and 2, 3 of W */
    int64x2_t low = vreinterpretq_s64_s32(a), high = vreinterpretq_s64_s32(b);
    return vreinterpretq_s32_s64(row ? vzip2q_s64(low, high) : vzip1q_s64(low, high));
}
#endif
