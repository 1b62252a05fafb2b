/* Eight fp32 lanes: AVX2, FMA and F16C. */
#define VW 8
#define VW_AVX /* has the instructions of AVX2 */
typedef __m256 vf;

HFA_INLINE vf vf_set1(float x) { return _mm256_set1_ps(x); }
HFA_INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
HFA_INLINE void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v); }
HFA_INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
HFA_INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
HFA_INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
HFA_INLINE vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
HFA_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
HFA_INLINE vf vf_select_lt(vf a, vf b, vf x, vf y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
HFA_INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); } /* b when either is NaN */
HFA_INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
HFA_INLINE vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
HFA_INLINE vf vf_round_int(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* a * 2^n for integral n in [-252, 254], in two factors so that neither leaves the exponent range */
HFA_INLINE vf vf_ldexp(vf a, vf n) {
    __m256i i = _mm256_cvtps_epi32(n), h = _mm256_srai_epi32(i, 1), bias = _mm256_set1_epi32(127);
    vf f = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(h, bias), 23));
    vf g = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, h), bias), 23));
    return _mm256_mul_ps(_mm256_mul_ps(a, f), g);
}
HFA_INLINE float vf_sum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
HFA_INLINE float vf_hmax(vf a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
HFA_INLINE void vf_sum4(vf a, vf b, vf c, vf d, float *out) {
    vf t = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}
#define HFA_OWN_TRANSPOSE
HFA_INLINE void vf_transpose(vf *rows) {
    vf b[8];
    UNROLL(2)
    for (int i = 0; i < 8; i += 4) {
        vf p = _mm256_unpacklo_ps(rows[i], rows[i + 1]), q = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        vf r = _mm256_unpacklo_ps(rows[i + 2], rows[i + 3]), s = _mm256_unpackhi_ps(rows[i + 2], rows[i + 3]);
        b[i] = _mm256_shuffle_ps(p, r, 0x44);
        b[i + 1] = _mm256_shuffle_ps(p, r, 0xee);
        b[i + 2] = _mm256_shuffle_ps(q, s, 0x44);
        b[i + 3] = _mm256_shuffle_ps(q, s, 0xee);
    }
    UNROLL(4)
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}
HFA_INLINE vf vf_load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
/* 2^(e - 127) of exponents of a byte, which are not 255; 2^-127 is subnormal and has no exponent of its own */
HFA_INLINE vf vf_load_exponents(const uint8_t *p) {
    __m256i e = _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)), 23);
    return _mm256_castsi256_ps(_mm256_max_epu32(e, _mm256_set1_epi32(1 << 22)));
}
HFA_INLINE vf vf_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
HFA_INLINE void vf_store_bf16(uint16_t *p, vf v) {
    __m256i u = _mm256_castps_si256(v), one = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(one, _mm256_set1_epi32(0x7fff))), 16);
    __m256i q = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    r = _mm256_blendv_epi8(r, q, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(r));
}
HFA_INLINE void vf_store_f16(uint16_t *p, vf v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* 16 bf16 values as two vectors: the even and the odd elements (one instruction each, no widening shuffle) */
HFA_INLINE void vf_pair_bf16(const uint16_t *p, vf *even, vf *odd) {
    __m256i u = _mm256_loadu_si256((const __m256i *)p);
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32((int)0xffff0000u)));
}

static const uint32_t vi_high_halves[8] __attribute__((aligned(32))) = { /* for tile_avx2.h */
    0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};

/* Integer products of packed weights, eight 32-bit lanes: one row of W each. */
typedef __m256i vi;
typedef __m256i v4; /* sums of int4 products: int16 pairs per lane */
HFA_INLINE vi vi_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
HFA_INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
HFA_INLINE vi vi_repeat(const void *p) { int32_t x; memcpy(&x, p, 4); return _mm256_set1_epi32(x); }
HFA_INLINE vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
/* `count` bits of every byte from bit `from` on, moved down to bit `to` on; shifts pairs of bytes: what comes over from the
 * neighbour is masked away */
HFA_INLINE vi vi_field(vi a, const int from, const int count, const int to) {
    return _mm256_and_si256(_mm256_srli_epi16(a, from - to), _mm256_set1_epi8((char)(((1 << count) - 1) << to)));
}
HFA_INLINE vi vi_table(const uint8_t *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)); }
/* what stands in the table for the four bits of every byte from bit `from` on */
HFA_INLINE vi vi_lookup(vi a, const int from, vi table) { return _mm256_shuffle_epi8(table, vi_field(a, from, 4, 0)); }
HFA_INLINE int32_t v4_start(int first, int second) { return (int32_t)((uint32_t)(uint16_t)first | (uint32_t)second << 16); }
HFA_INLINE v4 v4_begin(vi start) { return start; }
/* gcc would regroup such sums and run out of registers: KEEP makes it add in the order written */
#define KEEP(sum) __asm__("" : "+x"(sum))
HFA_INLINE v4 v4_dot(v4 sum, vi w, vi x) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
    KEEP(sum);
    return sum;
}
HFA_INLINE vf v4_end(v4 sum) { return _mm256_cvtepi32_ps(_mm256_madd_epi16(sum, _mm256_set1_epi16(1))); }
HFA_INLINE vi vi_load_int8(const void *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)); }
HFA_INLINE vi vi_dot16(vi sum, vi w, vi x) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
    KEEP(sum);
    return sum;
}
HFA_INLINE vf vi_float(vi a) { return _mm256_cvtepi32_ps(a); }
/* the nearest integers of a * by, which are below 2^22 (else any), ties to even: adding 1.5 * 2^23 leaves them in the low bits */
HFA_INLINE vi vi_nearest(vf a, vf by) {
    return _mm256_sub_epi32(_mm256_castps_si256(_mm256_fmadd_ps(a, by, _mm256_set1_ps(12582912.0f))), _mm256_set1_epi32(0x4b400000));
}
HFA_INLINE void vi_store_bytes(void *p, vi a) {
    __m256i low = _mm256_shuffle_epi8(a, _mm256_set1_epi32(0x0c080400));
    _mm_storel_epi64((__m128i *)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
HFA_INLINE void vi_store_shorts(void *p, vi a) {
    const __m256i pick = _mm256_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0, 15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_shuffle_epi8(a, pick), 0x08)));
}
HFA_INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
HFA_INLINE __m128i vi_sums_of_4(vi a) { /* lanes i, i + 4, ... together */
    return _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}
