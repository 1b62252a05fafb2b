/* Weights of fewer than 8 bits, groups of more than a block, beside so many rows of x that taking codes apart for each tile costs: a
 * stretch of 32 rows is taken apart once, stays in L1, and meets all rows of x; their totals wait in `out`. Same operations in the
 * same order as tile_few, whose registers run out beside 8 rows of x where sums of groups take some, too. */
enum { APART_FROM = HFA_MAX_ROWS + 1, STRETCH = 512, STRETCH_BLOCKS = STRETCH / HFA_QUANTUM, BOTH = STRIPS * HFA_LANES };
typedef struct {
    uint8_t codes[STRETCH_BLOCKS][HFA_QUANTUM / 4][BOTH][4];
    float scales[STRETCH_BLOCKS][BOTH]; /* of groups */
    const float *offsets[STRIPS];
    int64_t blocks, per_group;
} taken_apart;

HFA_INLINE void take_apart(const int FORMAT, const hfa_matrix *w, int64_t row, int64_t from, taken_apart *a) {
    int64_t padded = hfa_padded(w->inner), groups = (padded + w->group - 1) / w->group, scale_bytes = hfa_scale_bytes(FORMAT, w->stride);
    a->blocks = (padded - from < STRETCH ? padded - from : STRETCH) / HFA_QUANTUM;
    a->per_group = w->group / HFA_QUANTUM;
    for (int s = 0; s < STRIPS; s++) {
        int64_t strip = row / HFA_LANES + s, at = (strip * groups + from / w->group) * HFA_LANES;
        const char *codes = (const char *)w->weight + (strip * padded + from) * HFA_LANES * hfa_code_bits(FORMAT) / 8;
        int64_t code_strip = padded * HFA_LANES * hfa_code_bits(FORMAT) / 8;
        const char *turn = (const char *)w->weight + (strip + 1) * code_strip - HFA_PREFETCH_BYTES / 2; /* beyond lies a strip that goes together with this one */
        a->offsets[s] = w->offsets ? w->offsets + at : NULL;
        for (int64_t b = 0; b < a->blocks; b++, codes += HFA_QUANTUM * HFA_LANES * hfa_code_bits(FORMAT) / 8) {
            const char *ahead = codes + HFA_PREFETCH_BYTES / 2 + (codes >= turn ? (STRIPS - 1) * code_strip : 0);
            UNROLL(4)
            for (int i = 0; i < PER_BLOCK; i++) {
                vi low, high;
                load_codes(FORMAT, i, codes, &low, &high);
                if (i < hfa_code_bits(FORMAT)) __builtin_prefetch(ahead + i * 64, 0, HFA_PREFETCH_LEVEL);
                vf_store((float *)a->codes[b][2 * i][s * HFA_LANES], (vf)low);
                vf_store((float *)a->codes[b][2 * i + 1][s * HFA_LANES], (vf)high);
            }
        }
        for (int64_t g = 0; g < a->blocks / a->per_group; g++, at += HFA_LANES) {
            const char *scales = (const char *)w->scales + at * scale_bytes;
            __builtin_prefetch(scales + STRIPS * groups * HFA_LANES * scale_bytes, 0, HFA_PREFETCH_LEVEL);
            vf_store(a->scales[g] + s * HFA_LANES, scale_bytes == 1   ? vf_load_exponents((const uint8_t *)scales)
                                                   : scale_bytes == 4 ? vf_load((const float *)scales)
                                                   : w->stride == 3   ? vf_load_f16((const uint16_t *)scales)
                                                                      : vf_load_bf16((const uint16_t *)scales));
        }
    }
}

/* What follows the sums of a block: is it the first, is it the last of its group? */
#define ADD_APART(IS_FIRST, IS_LAST)                                                                                  \
    UNROLL(8)                                                                                                         \
    for (int m = 0; m < M; m++) {                                                                                     \
        vf by = vf_set1(x.scale[m]);                                                                                  \
        UNROLL(2)                                                                                                     \
        for (int v = 0; v < STRIPS; v++) {                                                                            \
            vf value = v4_end(sum[m][v]), all = IS_FIRST ? vf_mul(value, by) : vf_fma(value, by, vf_load(part[m][v])); \
            float *to = out + m * ldo + v * HFA_LANES;                                                                \
            if (IS_LAST) vf_store(to, vf_fma(all, vf_load(a->scales[group] + v * HFA_LANES), vf_load(to)));            \
            else vf_store(part[m][v], all);                                                                           \
        }                                                                                                             \
    }

HFA_INLINE void tile_apart(const int M, const taken_apart *a, rounded_rows x, float *out, int64_t ldo) {
    float part[TILE_ROWS][STRIPS][HFA_LANES] __attribute__((aligned(64))) = {0}, below[TILE_ROWS] = {0};
    const uint8_t *codes = &a->codes[0][0][0][0];
    for (int64_t b = 0, group = 0, inside = 0; b < a->blocks; b++) {
        v4 sum[TILE_ROWS][STRIPS];
        UNROLL(8)
        for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = v4_begin(vi_repeat(x.start + m));
        UNROLL(4)
        for (int i = 0; i < PER_BLOCK; i++, codes += 2 * 4 * BOTH, x.codes += 8 * x.g) {
            vi low[STRIPS] = {vi_load(codes), vi_load(codes + 64)}, high[STRIPS] = {vi_load(codes + 128), vi_load(codes + 192)};
            UNROLL(8)
            for (int m = 0; m < M; m++) {
                vi xl = vi_repeat(x.codes + 8 * m), xh = vi_repeat(x.codes + 8 * m + 4);
                UNROLL(2)
                for (int v = 0; v < STRIPS; v++) sum[m][v] = v4_dot(v4_dot(sum[m][v], low[v], xl), high[v], xh);
            }
            __asm__ volatile("" : : : "memory");
        }
        UNROLL(8)
        for (int m = 0; m < M; m++) __asm__ volatile("" : "+v"(sum[m][0]), "+v"(sum[m][1])); /* gcc would put half of them off */
        int is_last = ++inside == a->per_group;
        if (inside == 1) { ADD_APART(1, 0) }
        else if (is_last) { ADD_APART(0, 1) }
        else { ADD_APART(0, 0) }
        if (a->offsets[0]) {
            for (int m = 0; m < M; m++) below[m] += x.sum[m];
            for (int m = 0; is_last && m < M; m++) {
                for (int v = 0; v < STRIPS; v++) {
                    float *to = out + m * ldo + v * HFA_LANES;
                    vf_store(to, vf_fma(vf_load(a->offsets[v] + group * HFA_LANES), vf_set1(below[m]), vf_load(to)));
                }
                below[m] = 0.0f;
            }
        }
        if (is_last) inside = 0, group++;
        x.start += x.g, x.scale += x.g, x.sum += x.g;
    }
}
#undef ADD_APART

#define APART_FOR(M) case M: tile_apart(M, a, x, to, ldo); break;
static __attribute__((noinline)) void meet_all(const taken_apart *a, int64_t from, int64_t k, const char *packed, int m, float *out, int64_t ldo) {
    int64_t padded = hfa_padded(k);
    size_t row_bytes = (size_t)(padded + padded / HFA_QUANTUM * 12);
    for (int m0 = 0; m0 < m; m0 += HFA_ROUNDED_ROWS) {
        int g = m - m0 < HFA_ROUNDED_ROWS ? m - m0 : HFA_ROUNDED_ROWS;
        rounded_rows x = rows_of_group(packed + row_bytes * (size_t)m0, g, 0, k, 1);
        int64_t block = from / HFA_QUANTUM * g;
        float *to = out + m0 * ldo;
        x.codes += from * g, x.start += block, x.scale += block, x.sum += block;
        switch (g) {
            APART_FOR(1) APART_FOR(2) APART_FOR(3) APART_FOR(4) APART_FOR(5) APART_FOR(6) APART_FOR(7) APART_FOR(8)
        }
    }
}

/* out[m][BOTH] of 32 rows of W from `row` on */
HFA_INLINE void dot_apart(const int FORMAT, const hfa_matrix *w, int64_t row, const char *packed, int m, float *out, int64_t ldo) {
    taken_apart a;
    for (int i = 0; i < m; i++) memset(out + i * ldo, 0, BOTH * sizeof(float));
    for (int64_t from = 0; from < hfa_padded(w->inner); from += STRETCH) {
        take_apart(FORMAT, w, row, from, &a);
        meet_all(&a, from, w->inner, packed, m, out, ldo);
    }
}
#undef APART_FOR
