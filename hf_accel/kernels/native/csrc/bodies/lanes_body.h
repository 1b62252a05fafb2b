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

/* out[R][HFA_MAX_ROWS] (+)= of R rows of W, `stride` words apart, over a section, in V vectors of lanes */
HFA_INLINE void LANES(lanes_tile)(const int R, const int V, const float *w, int64_t stride, int64_t words, const float *x, int64_t ahead, int adds, float *out) {
    vf sums[12][2];
    UNROLL(12)
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = vf_set1(0.0f);
    for (int64_t i = 0; i < words; i += 16) {
        int64_t some = words - i < 16 ? words - i : 16;
        UNROLL(12)
        for (int r = 0; ahead && r < R; r++) __builtin_prefetch(w + r * stride + ahead, 0, HFA_PREFETCH_LEVEL);
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
    for (; n + R <= rows; n += R) LANES(lanes_tile)(R, V, w + n * stride, stride, some, x, ahead, i > 0, out + n * HFA_MAX_ROWS)

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
#undef PAIRS
