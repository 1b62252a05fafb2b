/* Products of bf16 by bfmmla, which multiplies two rows of four columns with two, included for bf16 by product_body.h: twice the
 * products of bfdot per instruction. As with bfdot each sum of two products is rounded to odd, and subnormals count as zero. */

/* Rows of x beside each other, [8] and [8], to columns 0 to 3 of both, then 4 to 7: what an instruction takes. Every step of a group of g. */
static void NAME(pair_rows)(NAME(packed) *x, int g, int64_t padded) {
    for (int64_t i = 0; i < padded; i += STEP, x += g * STEP)
        for (int m = 0; m + 1 < g; m += 2) {
            NAME(packed) *at = x + m * STEP;
            uint16x4_t high = vld1_u16(at + 4), low = vld1_u16(at + 8);
            vst1_u16(at + 4, low);
            vst1_u16(at + 8, high);
        }
}

HFA_INLINE bfloat16x8_t NAME(eight)(const void *p) { return vreinterpretq_bf16_u16(vld1q_u16(p)); }

/* acc[r][m]: two rows of x (2 m and the next) times two of W; the even r sum columns 0 to 3 of every eight, the odd ones 4 to 7. A row
 * without a partner takes part twice: whatever R and M are, a sum is made of the same additions in the same order. */
HFA_INLINE void NAME(matrix_step)(const int R, const int M, vf acc[4][HFA_PACK_ROWS / 2], const T *w, int64_t stride, const NAME(packed) *x) {
    bfloat16x8_t rows[4];
    UNROLL(2)
    for (int r = 0; r < R; r += 2) {
        int64x2_t a = vreinterpretq_s64_bf16(NAME(eight)(w + r * stride));
        int64x2_t b = r + 1 < R ? vreinterpretq_s64_bf16(NAME(eight)(w + (r + 1) * stride)) : a;
        rows[r] = vreinterpretq_bf16_s64(vzip1q_s64(a, b));
        rows[r + 1] = vreinterpretq_bf16_s64(vzip2q_s64(a, b));
    }
    UNROLL(4)
    for (int m = 0; m < M; m += 2) {
        bfloat16x8_t low = NAME(eight)(x + m * STEP), high = m + 1 < M ? NAME(eight)(x + (m + 1) * STEP) : low;
        if (m + 1 == M) {
            int64x2_t one = vreinterpretq_s64_bf16(low);
            low = vreinterpretq_bf16_s64(vzip1q_s64(one, one));
            high = vreinterpretq_bf16_s64(vzip2q_s64(one, one));
        }
        UNROLL(2)
        for (int r = 0; r < R; r += 2) {
            acc[r][m / 2] = vbfmmlaq_f32(acc[r][m / 2], low, rows[r]);
            acc[r + 1][m / 2] = vbfmmlaq_f32(acc[r + 1][m / 2], high, rows[r + 1]);
        }
    }
}

/* R rows of W against M rows of x, as the other dot_tile */
HFA_INLINE void NAME(dot_tile)(const int R, const int M, const T *w, int64_t stride, int64_t k, const NAME(packed) *x, float *out, int64_t ldo) {
    vf acc[4][HFA_PACK_ROWS / 2];
    const char *ahead = (const char *)w + HFA_PREFETCH_BYTES;
    int64_t i = 0;
    UNROLL(4)
    for (int r = 0; r < (R + 1) / 2 * 2; r++)
        UNROLL(4)
        for (int m = 0; m < (M + 1) / 2; m++) acc[r][m] = vf_set1(0.0f);
    for (; i + STEP <= k; i += STEP, x += M * STEP, ahead += R * STEP * sizeof(T)) {
        __builtin_prefetch(ahead, 0, HFA_PREFETCH_LEVEL);
        NAME(matrix_step)(R, M, acc, w + i, stride, x);
    }
    if (i < k) {
        T tail[4 * STEP] = {0}; /* never reads beyond a row */
        for (int r = 0; r < R; r++) memcpy(tail + r * STEP, w + r * stride + i, (size_t)(k - i) * sizeof(T));
        NAME(matrix_step)(R, M, acc, tail, STEP, x);
    }
    UNROLL(2)
    for (int r = 0; r < R; r += 2)
        UNROLL(8)
        for (int m = 0; m < M; m++) {
            vf both = vf_add(acc[r][m / 2], acc[r + 1][m / 2]);
            float32x2_t row = m % 2 ? vget_high_f32(both) : vget_low_f32(both);
            if (r + 1 < R) vst1_f32(out + m * ldo + r, row);
            else out[m * ldo + r] = vget_lane_f32(row, 0);
        }
}
