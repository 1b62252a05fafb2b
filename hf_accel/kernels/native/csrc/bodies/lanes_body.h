/* Products of many rows of x, a row in a lane: no sums across lanes, and each number of x and of W is loaded for many products.
 * x comes in blocks of HFA_MAX_ROWS rows, [words][HFA_MAX_ROWS], two vectors of them; words are fp32 numbers or, with PAIRS, two
 * bf16 numbers each. Included once per kind of word by instruction sets with 32 registers of sixteen lanes. */
#undef LANES
#undef MULTIPLY
#if PAIRS
#define LANES(x) x##_pairs
#define MULTIPLY(a, b, sum) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
#else
#define LANES(x) x##_words
#define MULTIPLY(a, b, sum) vf_fma(a, b, sum)
#endif

/* out[R][HFA_MAX_ROWS] (+)= of R rows of W, `stride` words apart, over a section, in V vectors of lanes. next: NULL, or rows of W,
 * `next_stride` words apart, that are wanted soon. */
HFA_INLINE void LANES(lanes_tile)(const int R, const int V, const float *w, int64_t stride, int64_t words, const float *x, const float *next,
                                  int64_t next_stride, int adds, float *out) {
    vf sums[12][2];
    UNROLL(12)
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = vf_set1(0.0f);
    for (int64_t i = 0; i < words; i += 16) {
        int64_t some = words - i < 16 ? words - i : 16;
        UNROLL(12)
        for (int r = 0; next && r < R; r++) __builtin_prefetch(next + r * next_stride + i, 0, HFA_PREFETCH_LEVEL);
        for (int64_t k = 0; k < some; k++, w++, x += HFA_MAX_ROWS) {
            vf low = vf_load(x), high = V > 1 ? vf_load(x + VW) : low;
            UNROLL(12)
            for (int r = 0; r < R; r++) {
                vf by = vf_set1(w[r * stride]);
                sums[r][0] = MULTIPLY(by, low, sums[r][0]);
                if (V > 1) sums[r][1] = MULTIPLY(by, high, sums[r][1]);
            }
        }
    }
    UNROLL(12)
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            float *to = out + r * HFA_MAX_ROWS + v * VW;
            vf_store(to, adds ? vf_add(vf_load(to), sums[r][v]) : sums[r][v]);
        }
}

#define LANES_TILES(R, V)                                                                                             \
    for (; n + R <= rows; n += R)                                                                                     \
        LANES(lanes_tile)(R, V, w + n * stride, stride, some, x, ahead ? w + n * stride + ahead : NULL, stride, i > 0, out + n * HFA_MAX_ROWS)

static void LANES(lanes)(const void *weight, int64_t stride, int64_t rows, int64_t words, const void *packed, int m, int is_first, float *out) {
    for (int64_t i = 0; i < words; i += HFA_SECTION) {
        int64_t some = words - i < HFA_SECTION ? words - i : HFA_SECTION, n = 0, ahead = is_first ? rows * stride : 0;
        const float *x = (const float *)packed + i * HFA_MAX_ROWS, *w = (const float *)weight + i;
        if (m > VW) {
            LANES_TILES(12, 2);
            LANES_TILES(4, 2);
            LANES_TILES(1, 2);
        } else {
            LANES_TILES(12, 1);
            LANES_TILES(4, 1);
            LANES_TILES(1, 1);
        }
    }
}
#undef LANES_TILES

/* R rows of W from row n on, over the section that begins at word i, against all rows of x. The rows lie thousands of bytes apart, often
 * a power of two, and would drive one another out of L1 before all of a line is used: so they are copied to where they fit. */
HFA_INLINE void LANES(lanes_together)(const int R, const float *w, int64_t stride, int64_t rows, int64_t words, int64_t n, int64_t i,
                                      int64_t some, const float *x, int64_t block, int m, float *out) {
    enum { APART = HFA_SECTION + 16 }; /* an odd number of lines */
    _Alignas(64) float near[R * APART];
    const float *from = w + n * stride + i, *next = n + R < rows ? from + R * stride : i + some < words ? w + i + some : w + rows * stride;
    UNROLL(1)
    for (int r = 0; r < R; r++) memcpy(near + r * APART, from + r * stride, (size_t)some * 4);
    for (int m0 = 0; m0 < m; m0 += HFA_MAX_ROWS, x += block, out += rows * HFA_MAX_ROWS, next = NULL) {
        if (m - m0 > VW) LANES(lanes_tile)(R, 2, near, APART, some, x + i * HFA_MAX_ROWS, next, stride, i > 0, out + n * HFA_MAX_ROWS);
        else LANES(lanes_tile)(R, 1, near, APART, some, x + i * HFA_MAX_ROWS, next, stride, i > 0, out + n * HFA_MAX_ROWS);
    }
}

static void LANES(lanes_blocks)(const void *weight, int64_t stride, int64_t rows, int64_t words, const void *x, int64_t block, int m,
                                float *out) {
    for (int64_t i = 0; i < words; i += HFA_SECTION) {
        int64_t some = words - i < HFA_SECTION ? words - i : HFA_SECTION, n = 0;
        for (; n + 12 <= rows; n += 12) LANES(lanes_together)(12, weight, stride, rows, words, n, i, some, x, block, m, out);
        for (; n + 4 <= rows; n += 4) LANES(lanes_together)(4, weight, stride, rows, words, n, i, some, x, block, m, out);
        for (; n < rows; n++) LANES(lanes_together)(1, weight, stride, rows, words, n, i, some, x, block, m, out);
    }
}
#undef PAIRS
