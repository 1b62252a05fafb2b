/* Sixteen fp32 lanes: AVX-512 F, BW, VL and DQ. */
#define VW 16
#define VW_AVX /* has the instructions of AVX2 */
typedef __m512 vf;

HFA_INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
HFA_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
HFA_INLINE void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
HFA_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
HFA_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
HFA_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
HFA_INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
HFA_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
HFA_INLINE vf vf_select_lt(vf a, vf b, vf x, vf y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x); }
HFA_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); } /* b when either is NaN */
HFA_INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
HFA_INLINE vf vf_abs(vf a) { return _mm512_abs_ps(a); }
HFA_INLINE vf vf_round_int(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
HFA_INLINE vf vf_ldexp(vf a, vf n) { return _mm512_scalef_ps(a, n); }
HFA_INLINE float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
HFA_INLINE float vf_hmax(vf a) { return _mm512_reduce_max_ps(a); }
/* Four horizontal sums together: 13 instructions instead of 4 x 8. */
HFA_INLINE void vf_sum4(vf a, vf b, vf c, vf d, float *out) {
    vf p = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    vf q = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    vf t = _mm512_add_ps(_mm512_shuffle_ps(p, q, 0x44), _mm512_shuffle_ps(p, q, 0xee)); /* a b c d in each 128 bits */
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(t), _mm512_extractf32x8_ps(t, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}
#define HFA_OWN_TRANSPOSE
/* 16 x 16 words: pairs of rows, pairs of pairs, then quarters of 128 bits */
HFA_INLINE void vf_transpose(vf *rows) {
    vf a[16], b[16];
    UNROLL(8)
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    UNROLL(4)
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    UNROLL(4)
    for (int i = 0; i < 4; i++) {
        vf p = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), q = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
        vf r = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd), s = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
        rows[i] = _mm512_shuffle_f32x4(p, q, 0x88);
        rows[i + 8] = _mm512_shuffle_f32x4(p, q, 0xdd);
        rows[i + 4] = _mm512_shuffle_f32x4(r, s, 0x88);
        rows[i + 12] = _mm512_shuffle_f32x4(r, s, 0xdd);
    }
}
HFA_INLINE vf vf_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
/* 2^(e - 127) of exponents of a byte, which are not 255; 2^-127 is subnormal and has no exponent of its own */
HFA_INLINE vf vf_load_exponents(const uint8_t *p) {
    __m512i e = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)), 23);
    return _mm512_castsi512_ps(_mm512_max_epu32(e, _mm512_set1_epi32(1 << 22)));
}
HFA_INLINE vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
HFA_INLINE void vf_store_bf16(uint16_t *p, vf v) {
    __m512i u = _mm512_castps_si512(v), hi = _mm512_srli_epi32(u, 16);
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(_mm512_and_si512(hi, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff)));
    r = _mm512_srli_epi32(r, 16);
    r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), hi, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(r));
}
HFA_INLINE void vf_store_f16(uint16_t *p, vf v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* 32 bf16 values as two vectors: the even and the odd elements (one instruction each, no widening shuffle) */
HFA_INLINE void vf_pair_bf16(const uint16_t *p, vf *even, vf *odd) {
    __m512i u = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32((int)0xffff0000u)));
}
#ifdef HFA_DOT_BF16
/* pairs of bf16 numbers as words; sum + the products of both */
HFA_INLINE vf vf_load_pairs(const uint16_t *p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
HFA_INLINE vf vf_dot_pairs(vf sum, vf a, vf b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#endif

/* Integer products of packed weights, sixteen 32-bit lanes: one row of W each. */
typedef __m512i vi;
typedef __m512i v4; /* sums of int4 products: int32 per lane with VNNI, int16 pairs without */
HFA_INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
HFA_INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
HFA_INLINE vi vi_repeat(const void *p) { int32_t x; memcpy(&x, p, 4); return _mm512_set1_epi32(x); }
HFA_INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
/* `count` bits of every byte from bit `from` on, moved down to bit `to` on */
HFA_INLINE vi vi_field(vi a, const int from, const int count, const int to) {
#ifdef HFA_BIT_MATRIX /* one instruction instead of two: row 7 - i of the matrix says which bits of a byte make up bit i */
    if (from != to) {
        uint64_t matrix = 0;
        for (int i = 0; i < count; i++) matrix |= (uint64_t)1 << (from + i) << 8 * (7 - to - i);
        return _mm512_gf2p8affine_epi64_epi8(a, _mm512_set1_epi64((int64_t)matrix), 0);
    }
#endif
    /* shifts pairs of bytes: what comes over from the neighbour is masked away */
    return _mm512_and_si512(_mm512_srli_epi16(a, from - to), _mm512_set1_epi8((char)(((1 << count) - 1) << to)));
}
HFA_INLINE vi vi_table(const uint8_t *p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)); }
/* what stands in the table for the four bits of every byte from bit `from` on */
HFA_INLINE vi vi_lookup(vi a, const int from, vi table) {
#ifdef HFA_BYTE_PERMUTE /* reads six bits, for which the table has four copies: nothing is to be masked away */
    return _mm512_permutexvar_epi8(from ? _mm512_srli_epi16(a, from) : a, table);
#else
    return _mm512_shuffle_epi8(table, vi_field(a, from, 4, 0));
#endif
}
HFA_INLINE vi vi_load_int8(const void *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
HFA_INLINE vf vi_float(vi a) { return _mm512_cvtepi32_ps(a); }
/* the nearest integers of a * by, which are below 2^22 (else any), ties to even: adding 1.5 * 2^23 leaves them in the low bits */
HFA_INLINE vi vi_nearest(vf a, vf by) {
    return _mm512_sub_epi32(_mm512_castps_si512(_mm512_fmadd_ps(a, by, _mm512_set1_ps(12582912.0f))), _mm512_set1_epi32(0x4b400000));
}
HFA_INLINE void vi_store_bytes(void *p, vi a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a)); }
HFA_INLINE void vi_store_shorts(void *p, vi a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(a)); }
HFA_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
HFA_INLINE __m128i vi_sums_of_4(vi a) { /* lanes i, i + 4, ... together */
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
#ifdef HFA_DOT_VNNI
HFA_INLINE int32_t v4_start(int first, int second) { return first + second; }
HFA_INLINE v4 v4_begin(vi start) { return start; }
HFA_INLINE v4 v4_dot(v4 sum, vi w, vi x) { return _mm512_dpbusd_epi32(sum, w, x); }
HFA_INLINE vf v4_end(v4 sum) { return _mm512_cvtepi32_ps(sum); }
HFA_INLINE vi vi_dot16(vi sum, vi w, vi x) { return _mm512_dpwssd_epi32(sum, w, x); }
#else
#define KEEP(sum) __asm__("" : "+v"(sum)) /* see vec_avx2.h */
HFA_INLINE int32_t v4_start(int first, int second) { return (int32_t)((uint32_t)(uint16_t)first | (uint32_t)second << 16); }
HFA_INLINE v4 v4_begin(vi start) { return start; }
HFA_INLINE v4 v4_dot(v4 sum, vi w, vi x) {
    sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(w, x));
    KEEP(sum);
    return sum;
}
HFA_INLINE vf v4_end(v4 sum) { return _mm512_cvtepi32_ps(_mm512_madd_epi16(sum, _mm512_set1_epi16(1))); }
HFA_INLINE vi vi_dot16(vi sum, vi w, vi x) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w, x));
    KEEP(sum);
    return sum;
}
#endif
