/* Products over weights as they lie in memory: `dot` (rows of W against rows of x) and `axpy` (W transposed).
 * Included by dtype_body.h once per dtype. A thread walks its rows in address order; a few rows are computed together
 * so that a load of x serves several of them, while software prefetch runs over the plain byte sequence, far ahead:
 * the memory then sees one sequential stream per thread (measured 35 GB/s on two cores against 29.5 without). */

#if defined(HFA_DOT_BF16) && DTYPE == 0
/* vdpbf16ps, bfdot: two products per lane and instruction, fp32 accumulation, subnormals count as zero. */
#define STEP (2 * VW)
typedef uint16_t NAME(packed);
typedef struct { vf a; } NAME(wide);
HFA_INLINE NAME(wide) NAME(wide_load)(const T *p) { return (NAME(wide)){vf_load_pairs(p)}; }
HFA_INLINE vf NAME(wide_dot)(vf acc, NAME(wide) w, const NAME(packed) *x) { return vf_dot_pairs(acc, w.a, vf_load_pairs(x)); }
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

#undef HAS_MATRIX
#if defined(HFA_MATRIX_BF16) && DTYPE == 0
#define HAS_MATRIX 1
#include "arch/arm/tile_bfmmla.h"
#else
#define HAS_MATRIX 0
#endif

static void NAME(pack_f32)(const float *x, int64_t stride, int m, int64_t k, void *packed) {
    NAME(packed) *out = packed;
    int64_t padded = (k + STEP - 1) / STEP * STEP;
    for (int m0 = 0; m0 < m; m0 += HFA_PACK_ROWS, out += HFA_PACK_ROWS * padded) {
        int g = m - m0 < HFA_PACK_ROWS ? m - m0 : HFA_PACK_ROWS;
        for (int i = 0; i < g; i++) NAME(pack_row)(x + (m0 + i) * stride, k, out + i * STEP, g * STEP);
#if HAS_MATRIX
        NAME(pair_rows)(out, g, padded);
#endif
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
#if HAS_MATRIX
        NAME(pair_rows)(out, g, padded);
#endif
    }
}

/* With products of bf16 by the instruction only these go over panels: x of fp32 is twice as long, and its sections are as they are. */
#undef HAS_PANELS
#if defined(PANELS_FROM) && (!defined(HFA_DOT_BF16) || DTYPE == 0)
#define HAS_PANELS 1
#else
#define HAS_PANELS 0
#endif

#if !HAS_MATRIX
#if HAS_PANELS && !defined(HFA_DOT_BF16)
#include "arch/x86/tile_avx2.h"
#else
HFA_INLINE void NAME(tile_step)(const int R, const int M, vf acc[4][HFA_PACK_ROWS], const T *w, int64_t stride, const NAME(packed) *x) {
#if defined(HFA_DOT_BF16) && DTYPE == 0 /* a load takes as long as a product: each number is loaded once, W and then x */
    NAME(wide) rows[4];
    UNROLL(4)
    for (int r = 0; r < R; r++) rows[r] = NAME(wide_load)(w + r * stride);
    UNROLL(8)
    for (int m = 0; m < M; m++) {
        NAME(wide) one = NAME(wide_load)(x + m * STEP);
        UNROLL(4)
        for (int r = 0; r < R; r++) acc[r][m] = vf_dot_pairs(acc[r][m], rows[r].a, one.a);
    }
    return;
#endif
    UNROLL(4)
    for (int r = 0; r < R; r++) {
        NAME(wide) v = NAME(wide_load)(w + r * stride);
        UNROLL(8)
        for (int m = 0; m < M; m++) acc[r][m] = NAME(wide_dot)(acc[r][m], v, x + m * STEP);
    }
}
#endif

/* The rest of a row, n < STEP elements, zero-padded: never reads beyond the row. */
HFA_INLINE NAME(wide) NAME(wide_tail)(const T *p, int64_t n) {
    T tail[STEP];
    memset(tail, 0, sizeof tail);
    memcpy(tail, p, (size_t)n * sizeof(T));
    return NAME(wide_load)(tail);
}

#undef AT
#define AT(e) ((e) < R * M ? (e) : 0)
/* Four sums at a time, also where only one is wanted: whatever R and M are, a sum comes out the same to the last bit. */
HFA_INLINE void NAME(finish_tile)(const int R, const int M, vf acc[4][HFA_PACK_ROWS], float *out, int64_t ldo) {
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
        NAME(tile_step)(R, M, acc, w + i, stride, x);                                                                 \
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
    if (i < k) {
        UNROLL(4)
        for (int r = 0; r < R; r++) {
            NAME(wide) v = NAME(wide_tail)(w + r * stride + i, k - i);
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
    NAME(finish_tile)(R, M, acc, out, ldo);
}
#endif

/* From this length on, one activation row takes the rows of W one by one: strictly sequential reads were 8 % faster than
 * four rows together (31.5 against 29.3 GB/s). Only where one chain of additions keeps up with the memory. */
#if DTYPE == 0 && defined(HFA_DOT_BF16) && VW == 16
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

#if HAS_PANELS
/* Many rows of x do not fit L1 over their whole length, and then each row of W waits for them to come from L2 again. So
 * the columns go in panels: SECTION of them for HFA_PACK_ROWS rows of x is half of a 32 KB L1, and HFA_PANEL_ROWS rows
 * of W pass over that before the next panel. Between panels the sums rest in memory as they are, vectors: the additions
 * of an output are those of dot_tile, one by one and in its order. AVX2: twelve sums in registers hide the latency of the
 * additions: 48 G products per second and core where the machine can make 50 (Zen 3, bf16, W in the cache); left to gcc,
 * 20 to 35. vdpbf16ps (Zen 4, two cores, W from memory, 2,048 x 8,192): 8 rows of x 150 G products per second where
 * x from L2 gave 80 and the memory allows 160; 16 rows 171 for 111 of 234 that the instruction makes. */
#define NEXT_ROWS 6 /* how far ahead W is prefetched */
#ifdef HFA_DOT_BF16
#define SECTION(M) ((M) > HFA_PACK_ROWS ? 16 * STEP : 32 * STEP) /* two groups of x stay in L1 together */
#define WHOLE_GROUP 8 /* up to so many rows of x go beside each row of W; larger groups in halves */
#else
#define SECTION(M) (32 * STEP) /* for fp32, where dot_tile starts a new section */
#define WHOLE_GROUP 6
#endif

/* R rows of W against M rows of x out of a packed group of G, over the columns of a panel; sums lie in order [R][G]. */
HFA_INLINE void NAME(panel_tile)(const int R, const int M, const int G, const T *w, int64_t stride, int64_t k,
                                 const NAME(packed) *x, const T *ahead, int share, float *sums, int is_first, int is_last, float *out, int64_t ldo) {
    vf acc[4][HFA_PACK_ROWS];
    UNROLL(4)
    for (int r = 0; r < R; r++)
        UNROLL(8)
        for (int m = 0; m < M; m++) acc[r][m] = DTYPE == 2 || is_first ? vf_set1(0.0f) : vf_load(sums + (r * G + m) * VW);
    int64_t i = 0;
    for (; i + STEP <= k; i += STEP, x += G * STEP) {
        if (ahead && i * (int64_t)sizeof(T) % (M < G ? 128 : 64) == 64 * share) {
            UNROLL(4)
            for (int r = 0; r < R; r++) __builtin_prefetch(ahead + r * stride + i, 0, HFA_PREFETCH_LEVEL);
        }
        NAME(tile_step)(R, M, acc, w + i, stride, x);
    }
    if (i < k) {
        UNROLL(4)
        for (int r = 0; r < R; r++) {
            NAME(wide) v = NAME(wide_tail)(w + r * stride + i, k - i);
            UNROLL(8)
            for (int m = 0; m < M; m++) acc[r][m] = NAME(wide_dot)(acc[r][m], v, x + m * STEP);
        }
    }
    UNROLL(4)
    for (int r = 0; r < R; r++)
        UNROLL(8)
        for (int m = 0; m < M; m++) {
            float *sum = sums + (r * G + m) * VW;
            if (DTYPE == 2) acc[r][m] = vf_add(is_first ? vf_set1(0.0f) : vf_load(sum), acc[r][m]);
            if (!is_last) vf_store(sum, acc[r][m]);
        }
    if (is_last) NAME(finish_tile)(R, M, acc, out, ldo);
}

/* R rows of W against a group of G rows of x. A large group goes in halves where these leave registers for W. */
HFA_INLINE void NAME(panel_rows)(const int R, const int G, const T *w, int64_t stride, int64_t k, const NAME(packed) *x,
                                 const T *ahead, float *sums, int is_first, int is_last, float *out, int64_t ldo) {
    const int M = G <= WHOLE_GROUP ? G : 4;
    NAME(panel_tile)(R, M, G, w, stride, k, x, ahead, 0, sums, is_first, is_last, out, ldo);
    if (M < G)
        NAME(panel_tile)(R, G - M, G, w, stride, k, x + M * STEP, ahead, 1, sums + M * VW, is_first, is_last, out + M * ldo, ldo);
}

#define PANEL_CASE(G)                                                                                                 \
    case G:                                                                                                           \
        for (int64_t n = 0, R; n < rows; n += R) {                                                                    \
            const T *wn = w + n * stride, *ahead = NULL;                                                              \
            float *sum = sums + n * G * VW;                                                                           \
            if (next) ahead = n + NEXT_ROWS < rows ? wn + NEXT_ROWS * stride : next + (n + NEXT_ROWS - rows) * stride; \
            R = n + PANEL_ROWS_FOR(G) <= rows ? PANEL_ROWS_FOR(G) : 1;                                                \
            if (R > 1) NAME(panel_rows)(PANEL_ROWS_FOR(G), G, wn, stride, k, x, ahead, sum, is_first, is_last, out + n, ldo); \
            else NAME(panel_rows)(1, G, wn, stride, k, x, ahead, sum, is_first, is_last, out + n, ldo);               \
        }                                                                                                             \
        break;

/* `rows` rows of W over one panel; next: where the row lies that follows them, NULL: W is in the cache already */
static void NAME(panel_group)(const T *w, int64_t stride, int64_t rows, int64_t k, const NAME(packed) *x, int g,
                              const T *next, float *sums, int is_first, int is_last, float *out, int64_t ldo) {
    switch (g) {
        PANEL_CASE(1) PANEL_CASE(2) PANEL_CASE(3) PANEL_CASE(4) PANEL_CASE(5) PANEL_CASE(6) PANEL_CASE(7) PANEL_CASE(8)
    }
}
#undef PANEL_CASE

static void NAME(dot_panels)(const T *weight, int64_t stride, int64_t rows, int64_t k, const NAME(packed) *x, int m,
                             float *out, int64_t ldo) {
    _Alignas(64) float sums[HFA_PANEL_ROWS * HFA_DOT_ROWS * VW];
    int64_t padded = (k + STEP - 1) / STEP * STEP;
    for (int64_t n = 0; n < rows; n += HFA_PANEL_ROWS) {
        const T *w = weight + n * stride;
        int64_t count = rows - n < HFA_PANEL_ROWS ? rows - n : HFA_PANEL_ROWS;
        for (int64_t i = 0, columns; i < k; i += columns) {
            columns = k - i < SECTION(m) + STEP ? k - i : SECTION(m); /* the rest of a row belongs to its last section */
            int is_last = i + columns == k;
            const T *next = is_last ? w + count * stride : w + i + columns;
            for (int m0 = 0; m0 < m; m0 += HFA_PACK_ROWS, next = NULL) {
                int g = m - m0 < HFA_PACK_ROWS ? m - m0 : HFA_PACK_ROWS;
                NAME(panel_group)(w + i, stride, count, columns, x + m0 * padded + i * g, g, next, sums + m0 * count * VW,
                                  i == 0, is_last, out + m0 * ldo + n, ldo);
            }
        }
    }
}
#undef SECTION
#undef WHOLE_GROUP
#undef NEXT_ROWS
#endif

static void NAME(dot)(const void *weight, int64_t stride, int64_t rows, int64_t k, const void *packed, int m, float *out,
                      int64_t ldo) {
    const T *w = weight;
    const NAME(packed) *x = packed;
    int64_t padded = (k + STEP - 1) / STEP * STEP;
#if HAS_PANELS
    if (m >= PANELS_FROM && k > HFA_MAX_HEAD_DIM) { /* shorter rows of x fit L1 */
        NAME(dot_panels)(w, stride, rows, k, x, m, out, ldo);
        return;
    }
#endif
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
