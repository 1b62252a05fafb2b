/* Products over weights as they lie in memory: `dot` (rows of W against rows of x) and `axpy` (W transposed).
 * Included by dtype_body.h once per dtype. A thread walks its rows in address order; a few rows are computed together
 * so that a load of x serves several of them, while software prefetch runs over the plain byte sequence, far ahead:
 * the memory then sees one sequential stream per thread (measured 35 GB/s on two cores against 29.5 without). */

#if defined(HFA_DOT_BF16) && DTYPE == 0
/* vdpbf16ps: 32 products per instruction, fp32 accumulation, subnormals count as zero. */
#define STEP 32
typedef uint16_t NAME(packed);
typedef struct { __m512bh a; } NAME(wide);
HFA_INLINE NAME(wide) NAME(wide_load)(const T *p) { return (NAME(wide)){(__m512bh)_mm512_loadu_si512(p)}; }
HFA_INLINE vf NAME(wide_dot)(vf acc, NAME(wide) w, const NAME(packed) *x) {
    return _mm512_dpbf16_ps(acc, w.a, (__m512bh)_mm512_loadu_si512(x));
}
HFA_INLINE void NAME(pack_step)(const float *x, NAME(packed) *out) { /* x holds bf16 values: truncation is exact */
    for (int i = 0; i < STEP; i++) out[i] = (uint16_t)(hfa_bits(x[i]) >> 16);
}
#else
#define STEP (2 * VW)
typedef float NAME(packed);
typedef struct { vf a, b; } NAME(wide);
HFA_INLINE NAME(wide) NAME(wide_load)(const T *p) {
    NAME(wide) w;
#if DTYPE == 0
    vf_pair_bf16(p, &w.a, &w.b);
#else
    w.a = LOADV(p);
    w.b = LOADV(p + VW);
#endif
    return w;
}
HFA_INLINE vf NAME(wide_dot)(vf acc, NAME(wide) w, const NAME(packed) *x) {
    return vf_fma(w.b, vf_load(x + VW), vf_fma(w.a, vf_load(x), acc));
}
HFA_INLINE void NAME(pack_step)(const float *x, NAME(packed) *out) {
#if DTYPE == 0 /* even elements, then odd ones: the order in which vf_pair_bf16 delivers the weights */
    for (int i = 0; i < VW; i++) { out[i] = x[2 * i]; out[VW + i] = x[2 * i + 1]; }
#else
    for (int i = 0; i < STEP; i++) out[i] = x[i];
#endif
}
#endif

HFA_INLINE void NAME(pack_row)(const float *x, int64_t k, NAME(packed) *out, int64_t spacing) {
    int64_t i = 0;
    for (; i + STEP <= k; i += STEP, out += spacing) NAME(pack_step)(x + i, out);
    if (i < k) {
        float tail[STEP] = {0};
        memcpy(tail, x + i, (size_t)(k - i) * sizeof(float));
        NAME(pack_step)(tail, out);
    }
}

static void NAME(pack_f32)(const float *x, int64_t stride, int m, int64_t k, void *packed) {
    NAME(packed) *out = packed;
    int64_t padded = (k + STEP - 1) / STEP * STEP;
    for (int m0 = 0; m0 < m; m0 += HFA_PACK_ROWS, out += HFA_PACK_ROWS * padded) {
        int g = m - m0 < HFA_PACK_ROWS ? m - m0 : HFA_PACK_ROWS;
        for (int i = 0; i < g; i++) NAME(pack_row)(x + (m0 + i) * stride, k, out + i * STEP, g * STEP);
    }
}

static void NAME(pack)(const void *x, int64_t stride, int m, int64_t k, void *packed) {
    const T *rows = x;
    NAME(packed) *out = packed;
    int64_t padded = (k + STEP - 1) / STEP * STEP;
    for (int m0 = 0; m0 < m; m0 += HFA_PACK_ROWS, out += HFA_PACK_ROWS * padded) {
        int g = m - m0 < HFA_PACK_ROWS ? m - m0 : HFA_PACK_ROWS;
        for (int i = 0; i < g; i++) {
            const T *row = rows + (m0 + i) * stride;
            NAME(packed) *to = out + i * STEP;
            for (int64_t j = 0; j < k; j += 8 * STEP) { /* by way of a small fp32 buffer that stays in L1 */
                float buffer[8 * STEP];
                int64_t n = k - j < 8 * STEP ? k - j : 8 * STEP;
                NAME(load)(row + j, buffer, n);
                NAME(pack_row)(buffer, n, to + j * g, g * STEP);
            }
        }
    }
}

#undef AT
#define AT(e) ((e) < R * M ? (e) : 0)
/* A single row of fp32 streams better by plain loads (27 GB/s against 26, medians of one run); all else by prefetch. */
#undef PREFETCHES
#define PREFETCHES(M) (DTYPE != 2 || (M) > 1)
/* One pass of dot_tile over the columns from i to END. */
#undef ACCUMULATE
#define ACCUMULATE(END)                                                                                               \
    for (; i < (END); i += STEP, x += M * STEP) {                                                                     \
        if (PREFETCHES(M)) {                                                                                          \
            UNROLL(8)                                                                                                 \
            for (size_t line = 0; line < R * STEP * sizeof(T); line += 64)                                            \
                __builtin_prefetch(ahead + line, 0, HFA_PREFETCH_LEVEL);                                              \
        }                                                                                                             \
        ahead += R * STEP * sizeof(T);                                                                                \
        UNROLL(4)                                                                                                     \
        for (int r = 0; r < R; r++) {                                                                                 \
            NAME(wide) v = NAME(wide_load)(w + r * stride + i);                                                       \
            UNROLL(8)                                                                                                 \
            for (int m = 0; m < M; m++) acc[r][m] = NAME(wide_dot)(acc[r][m], v, x + m * STEP);                       \
        }                                                                                                             \
    }

/* R rows of W against M rows of x; R and M are constants after inlining, so acc lives in registers. */
HFA_INLINE void NAME(dot_tile)(const int R, const int M, const T *w, int64_t stride, int64_t k, const NAME(packed) *x,
                               float *out, int64_t ldo) {
    vf acc[4][HFA_PACK_ROWS];
    UNROLL(4)
    for (int r = 0; r < R; r++)
        UNROLL(8)
        for (int m = 0; m < M; m++) acc[r][m] = vf_set1(0.0f);
    const char *ahead = (const char *)w + HFA_PREFETCH_BYTES;
    int64_t i = 0, whole = k - k % STEP;
#if DTYPE == 2
    vf total[4][HFA_PACK_ROWS]; /* fp32 sums come in sections: the error grows with the length of a chain of additions */
    UNROLL(4)
    for (int r = 0; r < R; r++)
        UNROLL(8)
        for (int m = 0; m < M; m++) total[r][m] = vf_set1(0.0f);
    for (int64_t stop = 32 * STEP; stop < whole; stop += 32 * STEP) {
        ACCUMULATE(stop)
        UNROLL(4)
        for (int r = 0; r < R; r++)
            UNROLL(8)
            for (int m = 0; m < M; m++) {
                total[r][m] = vf_add(total[r][m], acc[r][m]);
                acc[r][m] = vf_set1(0.0f);
            }
    }
#endif
    ACCUMULATE(whole)
    if (i < k) { /* the rest of a row, zero-padded: never reads beyond the row */
        UNROLL(4)
        for (int r = 0; r < R; r++) {
            T tail[STEP];
            memset(tail, 0, sizeof tail);
            memcpy(tail, w + r * stride + i, (size_t)(k - i) * sizeof(T));
            NAME(wide) v = NAME(wide_load)(tail);
            UNROLL(8)
            for (int m = 0; m < M; m++) acc[r][m] = NAME(wide_dot)(acc[r][m], v, x + m * STEP);
        }
    }
#if DTYPE == 2
    UNROLL(4)
    for (int r = 0; r < R; r++)
        UNROLL(8)
        for (int m = 0; m < M; m++) acc[r][m] = vf_add(total[r][m], acc[r][m]);
#endif
    /* four sums at a time, also where only one is wanted: whatever R and M are, a sum comes out the same to the last bit */
    UNROLL(8)
    for (int e = 0; e < R * M; e += 4) {
        float sums[4];
        vf_sum4(acc[e % R][e / R], acc[AT(e + 1) % R][AT(e + 1) / R], acc[AT(e + 2) % R][AT(e + 2) / R],
                acc[AT(e + 3) % R][AT(e + 3) / R], sums);
        UNROLL(4)
        for (int j = 0; j < 4; j++)
            if (e + j < R * M) out[(e + j) / R * ldo + (e + j) % R] = sums[j];
    }
}

/* From this length on, one activation row takes the rows of W one by one: strictly sequential reads were 8 % faster than
 * four rows together (31.5 against 29.3 GB/s). Only where one chain of additions keeps up with the memory. */
#if DTYPE == 0 && defined(HFA_DOT_BF16)
#define SINGLE_ROW_FROM 512
#else
#define SINGLE_ROW_FROM INT64_MAX
#endif
#define DOT_CASE(M)                                                                                                   \
    case M:                                                                                                           \
        for (; n + ROWS_FOR(M) <= rows && !(M == 1 && k >= SINGLE_ROW_FROM); n += ROWS_FOR(M))                        \
            NAME(dot_tile)(ROWS_FOR(M), M, w + n * stride, stride, k, x, out + n, ldo);                               \
        for (; n < rows; n++) NAME(dot_tile)(1, M, w + n * stride, stride, k, x, out + n, ldo);                       \
        break;

static void NAME(dot_group)(const T *w, int64_t stride, int64_t rows, int64_t k, const NAME(packed) *x, int m, float *out,
                            int64_t ldo) {
    int64_t n = 0;
    switch (m) {
        DOT_CASE(1) DOT_CASE(2) DOT_CASE(3) DOT_CASE(4) DOT_CASE(5) DOT_CASE(6) DOT_CASE(7) DOT_CASE(8)
    }
}
#undef DOT_CASE
#undef SINGLE_ROW_FROM

static void NAME(dot)(const void *weight, int64_t stride, int64_t rows, int64_t k, const void *packed, int m, float *out,
                      int64_t ldo) {
    const T *w = weight;
    const NAME(packed) *x = packed;
    int64_t padded = (k + STEP - 1) / STEP * STEP;
    if (m <= HFA_PACK_ROWS) {
        NAME(dot_group)(w, stride, rows, k, x, m, out, ldo);
        return;
    }
    for (int64_t n = 0; n < rows; n += 4) { /* the second group of x rows finds these rows of W in the cache */
        int64_t count = rows - n < 4 ? rows - n : 4;
        NAME(dot_group)(w + n * stride, stride, count, k, x, HFA_PACK_ROWS, out + n, ldo);
        NAME(dot_group)(w + n * stride, stride, count, k, x + HFA_PACK_ROWS * padded, m - HFA_PACK_ROWS,
                        out + HFA_PACK_ROWS * ldo + n, ldo);
    }
}

/* out[M][cols] += coef[M][R] W[R][cols]; `ahead` is how many elements on the row to prefetch lies. */
HFA_INLINE void NAME(axpy_tile)(const int R, const int M, const T *w, int64_t stride, int64_t cols, const float *coef,
                                int64_t ldc, float *out, int64_t ldo, int64_t ahead) {
    int64_t j = 0;
    for (; j + 2 * VW <= cols; j += 2 * VW) {
        vf acc[4][2];
        UNROLL(4)
        for (int m = 0; m < M; m++) {
            acc[m][0] = vf_set1(0.0f); /* summing R rows apart before adding them keeps the error of long sums down */
            acc[m][1] = vf_set1(0.0f);
        }
        UNROLL(8)
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(w + r * stride + j + ahead, 0, HFA_PREFETCH_LEVEL);
            vf a = LOADV(w + r * stride + j), b = LOADV(w + r * stride + j + VW);
            UNROLL(4)
            for (int m = 0; m < M; m++) {
                vf c = vf_set1(coef[m * ldc + r]);
                acc[m][0] = vf_fma(a, c, acc[m][0]);
                acc[m][1] = vf_fma(b, c, acc[m][1]);
            }
        }
        UNROLL(4)
        for (int m = 0; m < M; m++) {
            vf_store(out + m * ldo + j, vf_add(vf_load(out + m * ldo + j), acc[m][0]));
            vf_store(out + m * ldo + j + VW, vf_add(vf_load(out + m * ldo + j + VW), acc[m][1]));
        }
    }
    for (; j < cols; j++)
        for (int m = 0; m < M; m++) {
            float sum = 0.0f;
            for (int r = 0; r < R; r++) sum += coef[m * ldc + r] * LOAD1(w + r * stride + j);
            out[m * ldo + j] += sum;
        }
}

#define AXPY_CASE(M)                                                                                                  \
    case M:                                                                                                           \
        if (r == 8) NAME(axpy_tile)(8, M, wk, stride, cols, c, ldc, o, ldo, ahead);                                   \
        else NAME(axpy_tile)((int)r, M, wk, stride, cols, c, ldc, o, ldo, 0);                                         \
        break;

static void NAME(axpy)(const void *weight, int64_t stride, int64_t k, int64_t cols, const float *coef, int64_t ldc, int m,
                       float *out, int64_t ldo) {
    int64_t rows_ahead = HFA_PREFETCH_BYTES / (cols * (int64_t)sizeof(T)) / 8 * 8;
    int64_t ahead = (rows_ahead < 8 ? 8 : rows_ahead) * stride;
    for (int64_t i = 0; i < k; i += 8) {
        const T *wk = (const T *)weight + i * stride;
        int64_t r = k - i < 8 ? k - i : 8;
        for (int m0 = 0; m0 < m; m0 += 4) {
            const float *c = coef + m0 * ldc + i;
            float *o = out + m0 * ldo;
            switch (m - m0 < 4 ? m - m0 : 4) {
                AXPY_CASE(1) AXPY_CASE(2) AXPY_CASE(3) AXPY_CASE(4)
            }
        }
    }
}
#undef AXPY_CASE
