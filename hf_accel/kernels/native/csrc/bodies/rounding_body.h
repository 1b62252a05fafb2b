/* Rows of x are rounded for products with packed weights; included once per instruction set.
 *
 * Rounded rows come in groups of g <= 8:
 *   int8: int16 [Kp / 2][g][2], fewer bits: int8 [Kp / 8][g][8];   then, Kp / 32 times g each:
 *   int32 start (what sums of products begin at: it undoes the 2, 4, 8 or 12 added to codes; int16 for columns 0, 1 and 2, 3 of
 *   every four where such pairs are summed apart), fp32 scale, fp32 sum of x (for weights with offsets). */

#define VECTORS (HFA_LANES / VW)
enum { PER_BLOCK = HFA_QUANTUM / 8 };

typedef struct { char *codes; int32_t *start; float *scale, *sum; } rounded;

/* The parts of a group of g rows that begins at `packed`; `bytes` per code. */
HFA_INLINE rounded rounded_parts(const void *packed, int g, int64_t k, int bytes) {
    int64_t padded = hfa_padded(k), blocks = padded / HFA_QUANTUM;
    rounded r = {.codes = (char *)packed};
    r.start = (int32_t *)(r.codes + g * padded * bytes);
    r.scale = (float *)(r.start + g * blocks);
    r.sum = r.scale + g * blocks;
    return r;
}

/* What 32 values are multiplied by to lie in [-top, top]; *scale undoes it, and is NaN if a value is not finite. */
HFA_INLINE float inverse_scale(const float *x, float top, float *scale) {
    vf most = vf_set1(0.0f), strange = vf_set1(0.0f), zero = vf_set1(0.0f);
    for (int i = 0; i < HFA_QUANTUM; i += VW) {
        vf v = vf_load(x + i);
        most = vf_max(most, vf_abs(v));
        strange = vf_add(strange, vf_mul(v, zero));
    }
    float largest = vf_hmax(most), inverse = largest > 0.0f ? top / largest : 0.0f;
    if (!(inverse <= 3.0e38f)) { /* so small that the inverse overflows: nothing that a sum of products could show */
        inverse = 0.0f;
        largest = 0.0f;
    }
    *scale = largest / top + vf_sum(strange);
    return inverse;
}

/* 32 values times `inverse` to the nearest integers, ties to even, as bytes or (wide) int16; sums: of columns i, i + 4, ... */
HFA_INLINE void round_block(const int is_wide, const float *x, float inverse, void *codes, int32_t sums[4]) {
#ifdef VW_AVX
    vi sum = vi_zero();
    vf by = vf_set1(inverse);
    UNROLL(4)
    for (int i = 0; i < HFA_QUANTUM; i += VW) {
        vi some = vi_nearest(vf_load(x + i), by);
        sum = vi_add(sum, some);
        if (is_wide) vi_store_shorts((int16_t *)codes + i, some);
        else vi_store_bytes((int8_t *)codes + i, some);
    }
    _mm_storeu_si128((__m128i *)sums, vi_sums_of_4(sum));
#else /* adding 1.5 * 2^23 leaves them in the low bits */
    for (int c = 0; c < 4; c++) sums[c] = 0;
    for (int i = 0; i < HFA_QUANTUM; i++) {
        int32_t code = (int32_t)(hfa_bits(x[i] * inverse + 12582912.0f) - 0x4b400000u);
        sums[i % 4] += code;
        if (is_wide) ((int16_t *)codes)[i] = (int16_t)code;
        else ((int8_t *)codes)[i] = (int8_t)code;
    }
#endif
}

/* Columns i to i + 31 of a row of k: where they lie, or with zeros behind the last in `block`. */
HFA_INLINE const float *block_of(const float *x, int64_t k, int64_t i, float *block) {
    if (k - i >= HFA_QUANTUM) return x + i;
    memcpy(block, x + i, (size_t)(k - i) * sizeof(float));
    for (int64_t n = k - i; n < HFA_QUANTUM; n++) block[n] = 0.0f;
    return block;
}

/* The codes of MXFP4: twice the fp4 values, which are whole numbers, plus 12. In the sums of int16 that some instruction sets
 * make, of 16 products each, what is in between may wrap around; the sum without the 12 is at most 16 * 12 * 127 and fits. */
enum { FP4_HALF = 12 };
static const uint8_t fp4_codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

/* `half`: what is added to the codes that these rows meet; `unit`: what a code counts */
static void round_to_8(int half, float unit, const float *x, int64_t stride, int m, int64_t k, void *packed) {
    char *at = packed;
    int64_t padded = hfa_padded(k);
    for (int m0 = 0; m0 < m; m0 += HFA_ROUNDED_ROWS) {
        int g = m - m0 < HFA_ROUNDED_ROWS ? m - m0 : HFA_ROUNDED_ROWS;
        rounded r = rounded_parts(at, g, k, 1);
        for (int i = 0; i < g; i++)
            for (int64_t b = 0; b < padded / HFA_QUANTUM; b++) {
                float room[HFA_QUANTUM], scale;
                int32_t sums[4];
                int8_t bytes[HFA_QUANTUM];
                const float *block = block_of(x + (m0 + i) * stride, k, b * HFA_QUANTUM, room);
                float inverse = inverse_scale(block, 127.0f, &scale);
                round_block(0, block, inverse, bytes, sums);
                scale *= unit;
                int first = sums[0] + sums[1], second = sums[2] + sums[3];
                char *to = r.codes + b * HFA_QUANTUM * g + i * 8;
                for (int j = 0; j < PER_BLOCK; j++) memcpy(to + j * 8 * g, bytes + j * 8, 8);
                r.start[b * g + i] = v4_start(-half * first, -half * second);
                r.scale[b * g + i] = scale;
                r.sum[b * g + i] = scale * (float)(first + second);
            }
        at = (char *)(r.sum + g * padded / HFA_QUANTUM);
    }
}

static void round_to_16(const float *x, int64_t stride, int m, int64_t k, void *packed) {
    char *at = packed;
    int64_t padded = hfa_padded(k);
    for (int m0 = 0; m0 < m; m0 += HFA_ROUNDED_ROWS) {
        int g = m - m0 < HFA_ROUNDED_ROWS ? m - m0 : HFA_ROUNDED_ROWS;
        rounded r = rounded_parts(at, g, k, 2);
        for (int i = 0; i < g; i++)
            for (int64_t b = 0; b < padded / HFA_QUANTUM; b++) {
                float room[HFA_QUANTUM], scale;
                int32_t sums[4];
                int16_t codes[HFA_QUANTUM];
                const float *block = block_of(x + (m0 + i) * stride, k, b * HFA_QUANTUM, room);
                float inverse = inverse_scale(block, 32767.0f, &scale);
                round_block(1, block, inverse, codes, sums);
                char *to = r.codes + b * HFA_QUANTUM * 2 * g + i * 4;
                for (int j = 0; j < HFA_QUANTUM; j += 2) memcpy(to + j * 2 * g, codes + j, 4);
                int32_t sum = sums[0] + sums[1] + sums[2] + sums[3];
                r.start[b * g + i] = 0;
                r.scale[b * g + i] = scale;
                r.sum[b * g + i] = scale * (float)sum;
            }
        at = (char *)(r.sum + g * padded / HFA_QUANTUM);
    }
}

static void round_for(int64_t format, const float *x, int64_t stride, int m, int64_t k, void *packed) {
    if (format == HFA_INT8) round_to_16(x, stride, m, k, packed);
    else if (format == HFA_FP4) round_to_8(FP4_HALF, 0.5f, x, stride, m, k, packed);
    else round_to_8(1 << (hfa_code_bits(format) - 1), 1.0f, x, stride, m, k, packed);
}
