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
 * `next_stride` words apart, that are wanted soon; copy: NULL, or where they go meanwhile, `stride` words apart, a line beside each
 * word of x. */
HFA_INLINE void LANES(lanes_tile)(const int R, const int V, const float *w, int64_t stride, int64_t words, const float *x, const float *next,
                                  int64_t next_stride, float *copy, int adds, float *out) {
    vf sums[12][2];
    UNROLL(12)
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = vf_set1(0.0f);
    for (int64_t i = 0; i < words; i += 16) {
        int64_t some = words - i < 16 ? words - i : 16;
        for (int64_t k = 0; k < some; k++, w++, x += HFA_MAX_ROWS) {
            vf low = vf_load(x), high = V > 1 ? vf_load(x + VW) : low;
            if (k < R && copy) vf_store(copy + k * stride + i, vf_load(next + k * next_stride + i));
            else if (k < R && next) __builtin_prefetch(next + k * next_stride + i, 0, HFA_PREFETCH_LEVEL);
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
        LANES(lanes_tile)(R, V, w + n * stride, stride, some, x, ahead ? w + n * stride + ahead : NULL, stride, NULL, i > 0, \
                          out + n * HFA_MAX_ROWS)

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

/* R rows of W over a section, which lie at `near`, against all rows of x. The rows after them come into L2 beside the first block of
 * x and, where there is a `copy`, to it beside the last: alone a copy would wait for one line after the other, a twelfth of the time. */
HFA_INLINE void LANES(lanes_together)(const int R, const float *near, int64_t apart, int64_t words, const float *x, int64_t block, int m,
                                      const float *next, int64_t stride, float *copy, int adds, int64_t rows, float *out) {
    for (int m0 = 0; m0 < m; m0 += HFA_MAX_ROWS, x += block, out += rows * HFA_MAX_ROWS) {
        float *to = m0 && m0 + HFA_MAX_ROWS >= m ? copy : NULL;
        const float *from = m0 && !to ? NULL : next;
        if (m - m0 > VW) LANES(lanes_tile)(R, 2, near, apart, words, x, from, stride, to, adds, out);
        else LANES(lanes_tile)(R, 1, near, apart, words, x, from, stride, to, adds, out);
    }
}

/* Twelve rows of W at a time. They lie thousands of bytes apart, often a power of two, and would drive one another out of L1 before all
 * of a line is used: so they are copied to where they fit. */
static void LANES(lanes_blocks)(const void *weight, int64_t stride, int64_t rows, int64_t words, const void *packed, int64_t block, int m,
                                float *out) {
    enum { APART = HFA_SECTION + 16 }; /* an odd number of lines */
    _Alignas(64) float near[2][12 * APART];
    int at = 0, is_there = 0;
    for (int64_t i = 0; i < words; i += HFA_SECTION) {
        int64_t some = words - i < HFA_SECTION ? words - i : HFA_SECTION;
        const float *x = (const float *)packed + i * HFA_MAX_ROWS, *section = (const float *)weight + i;
        for (int64_t n = 0, step; n < rows; n += step) {
            step = rows - n >= 12 ? 12 : rows - n >= 4 ? 4 : 1;
            int64_t left = n + step < rows ? rows - n - step : i + some < words ? rows : 0, after = n + step < rows ? some : words - i - some;
            const float *from = section + n * stride, *next = n + step < rows ? from + step * stride : left ? section + some : section + rows * stride;
            float *to = out + n * HFA_MAX_ROWS, *mine = near[at];
            if (after > HFA_SECTION) after = HFA_SECTION;
            int copies = left >= 12 && step == 12 && m > HFA_MAX_ROWS && after == some && some % 16 == 0;
            for (int64_t r = 0; !is_there && r < step; r++) memcpy(mine + r * APART, from + r * stride, (size_t)some * 4);
            if (step == 12) LANES(lanes_together)(12, mine, APART, some, x, block, m, next, stride, copies ? near[!at] : NULL, i > 0, rows, to);
            else if (step == 4) LANES(lanes_together)(4, mine, APART, some, x, block, m, next, stride, NULL, i > 0, rows, to);
            else LANES(lanes_together)(1, mine, APART, some, x, block, m, next, stride, NULL, i > 0, rows, to);
            is_there = copies;
            at = !at;
        }
    }
}
#undef PAIRS
