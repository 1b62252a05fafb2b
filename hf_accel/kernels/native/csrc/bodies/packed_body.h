/* Products with packed weights of 8 to 2 bits and of MXFP4; included once per instruction set.
 *
 * A lane is a row of W, so sums need no reduction over lanes and scales load as vectors. Per block of 32 columns the
 * products are summed exactly in integers, then scaled and added in fp32; a row's result is therefore the same to the
 * last bit however many rows of x there are. How rows of x are rounded: rounding_body.h. */
#include "bodies/rounding_body.h"

/* How many strips of HFA_LANES rows of W go together, and at most how many rows of x they meet before the next: what the vector
 * registers hold. Two strips halve the loads of x, which many rows of it are short of; a single row waits for memory. */
#if VW == 16
enum { STRIPS = 2, TILE_ROWS = 8, MOST_V = STRIPS * VECTORS };
#else
enum { STRIPS = 1, TILE_ROWS = 4, MOST_V = STRIPS * VECTORS };
#endif

/* Rows m0.. of a group of g rounded rows: parts of row m are at m, of the next block g further; a code takes `bytes`. */
typedef struct { const char *codes; const int32_t *start; const float *scale, *sum; int64_t g; } rounded_rows;

HFA_INLINE rounded_rows rows_of_group(const void *packed, int g, int m0, int64_t k, int bytes) {
    rounded r = rounded_parts(packed, g, k, bytes);
    return (rounded_rows){r.codes + m0 * (bytes == 2 ? 4 : 8), r.start + m0, r.scale + m0, r.sum + m0, g};
}

/* of the group: += sums * scale of x, and the sums of x. A group of one block has its first addition left out: to zero. */
#define ADD_BLOCK(VALUE)                                                                                              \
    UNROLL(8)                                                                                                         \
    for (int m = 0; m < M; m++) {                                                                                     \
        vf by = vf_set1(x.scale[m]);                                                                                  \
        UNROLL(4)                                                                                                     \
        for (int v = 0; v < V; v++) part[m][v] = IS_SINGLE ? vf_mul(VALUE, by) : vf_fma(VALUE, by, part[m][v]);       \
    }                                                                                                                 \
    if (offsets) {                                                                                                    \
        UNROLL(8)                                                                                                     \
        for (int m = 0; m < M; m++) below[m] += x.sum[m];                                                             \
    }                                                                                                                 \
    x.start += x.g, x.scale += x.g, x.sum += x.g;

/* totals += those of the group * its scale, and + its offset * sums of x */
#define ADD_GROUP                                                                                                     \
    UNROLL(8)                                                                                                         \
    for (int m = 0; m < M; m++) {                                                                                     \
        UNROLL(4)                                                                                                     \
        for (int v = 0; v < V; v++) total[m][v] = vf_fma(part[m][v], scale[v], total[m][v]);                          \
    }                                                                                                                 \
    if (offsets) {                                                                                                    \
        UNROLL(4)                                                                                                     \
        for (int v = 0; v < V; v++) {                                                                                 \
            vf offset = vf_load(offsets + v / VECTORS * offset_strip + v % VECTORS * VW);                             \
            UNROLL(8)                                                                                                 \
            for (int m = 0; m < M; m++) total[m][v] = vf_fma(offset, vf_set1(below[m]), total[m][v]);                 \
        }                                                                                                             \
        offsets += HFA_LANES;                                                                                         \
    }

/* What lies ahead of a strip that goes together with the next one is the strip after both. */
#define BEGIN_TILE(FORMAT)                                                                                            \
    const int V = S * VECTORS;                                                                                        \
    int64_t padded = hfa_padded(w->inner), strip = row / HFA_LANES, groups = (padded + w->group - 1) / w->group;      \
    int64_t scale_bytes = hfa_scale_bytes(FORMAT, w->stride), code_strip = padded * hfa_code_bits(FORMAT) / 8 * HFA_LANES; \
    int64_t offset_strip = groups * HFA_LANES, scale_strip = offset_strip * scale_bytes;                              \
    const char *codes = (const char *)w->weight + strip * code_strip;                                                 \
    const char *scales = (const char *)w->scales + strip * scale_strip;                                               \
    const float *offsets = w->offsets ? w->offsets + strip * offset_strip : NULL;                                     \
    const char *turn = codes + code_strip - HFA_PREFETCH_BYTES / 2;                                                   \
    vf total[TILE_ROWS][MOST_V];                                                                                      \
    UNROLL(8)                                                                                                         \
    for (int m = 0; m < M; m++)                                                                                       \
        UNROLL(4)                                                                                                     \
        for (int v = 0; v < V; v++) total[m][v] = vf_set1(0.0f);

#define AHEAD(OFFSET)                                                                                                 \
    UNROLL(4)                                                                                                         \
    for (int s = 0; s < S; s++) __builtin_prefetch(ahead + s * code_strip + (OFFSET), 0, HFA_PREFETCH_LEVEL);

/* blocks b of every group */
#define FOR_BLOCKS                                                                                                    \
    for (int64_t b = 0, end = 0; b < padded / HFA_QUANTUM;) {                                                         \
        vf part[TILE_ROWS][MOST_V], scale[MOST_V];                                                                    \
        float below[TILE_ROWS];                                                                                       \
        UNROLL(4)                                                                                                     \
        for (int v = 0; v < V; v++) {                                                                                 \
            const char *at = scales + v / VECTORS * scale_strip + v % VECTORS * VW * scale_bytes;                     \
            scale[v] = scale_bytes == 1   ? vf_load_exponents((const uint8_t *)at)                                    \
                       : scale_bytes == 4 ? vf_load((const float *)at)                                                \
                       : w->stride == 3   ? vf_load_f16((const uint16_t *)at)                                         \
                                          : vf_load_bf16((const uint16_t *)at);                                       \
        }                                                                                                             \
        __builtin_prefetch(scales + HFA_PREFETCH_BYTES / 16, 0, HFA_PREFETCH_LEVEL);                                  \
        scales += HFA_LANES * scale_bytes;                                                                            \
        UNROLL(8)                                                                                                     \
        for (int m = 0; m < M; m++) {                                                                                 \
            below[m] = 0.0f;                                                                                          \
            UNROLL(4)                                                                                                 \
            for (int v = 0; v < V; v++) part[m][v] = vf_set1(0.0f);                                                   \
        }                                                                                                             \
        for (end += IS_SINGLE ? 1 : w->group / HFA_QUANTUM; b < end; b++)

#define TILE_BEGINS_BLOCK const char *ahead = codes + HFA_PREFETCH_BYTES / 2 + (S > 1 && codes >= turn ? (S - 1) * code_strip : 0);

HFA_INLINE void store_tile(const int M, const int S, vf total[TILE_ROWS][MOST_V], int64_t rows, float *out, int64_t ldo) {
    for (int m = 0; m < M; m++) {
        float values[STRIPS * HFA_LANES];
        float *to = rows >= S * HFA_LANES ? out + m * ldo : values;
        for (int v = 0; v < S * VECTORS; v++) vf_store(to + v * VW, total[m][v]);
        if (rows < S * HFA_LANES) memcpy(out + m * ldo, values, (size_t)rows * sizeof(float));
    }
}

/* Codes plus half their range of columns 8 i to 8 i + 7 of the block at `codes`, four columns in a register. */
HFA_INLINE void load_codes(const int FORMAT, const int i, const char *codes, vi *low, vi *high) {
    const int BITS = hfa_code_bits(FORMAT);
    if (FORMAT == HFA_FP4) {
        vi part = vi_load(codes + i * 4 * HFA_LANES), table = vi_table(fp4_codes);
        *low = vi_lookup(part, 0, table);
        *high = vi_lookup(part, 4, table);
        return;
    }
    if (BITS == 3 && i == 3) { /* two bits lie in the first and second part, the lowest one in the third */
        vi ones = vi_load(codes + 8 * HFA_LANES);
        *low = vi_or(vi_field(vi_load(codes), 6, 2, 1), vi_field(ones, 6, 1, 0));
        *high = vi_or(vi_field(vi_load(codes + 4 * HFA_LANES), 6, 2, 1), vi_field(ones, 7, 1, 0));
        return;
    }
    vi part = vi_load(codes + (BITS == 2 ? i / 2 : i) * 4 * HFA_LANES);
    int from = BITS == 2 ? i % 2 * 4 : 0;
    *low = vi_field(part, from, BITS, 0);
    *high = vi_field(part, from + BITS, BITS, 0);
}

#ifdef HFA_PAIRS_OF_ROWS
/* The sums of a block for an even number of rows of x, two at a time; they are exact, and so the same as row by row. */
HFA_INLINE void block_in_pairs(const int FORMAT, const int M, const char *codes, rounded_rows x, v4 sum[TILE_ROWS][MOST_V]) {
    v4_pair pairs[TILE_ROWS / 2][VECTORS];
    UNROLL(2)
    for (int p = 0; p < M / 2; p++)
        UNROLL(4)
        for (int v = 0; v < VECTORS; v++) pairs[p][v] = v4_pair_begin(x.start + 2 * p);
    UNROLL(4)
    for (int i = 0; i < PER_BLOCK; i++, x.codes += 8 * x.g) {
        if (i < hfa_code_bits(FORMAT)) __builtin_prefetch(codes + i * 4 * HFA_LANES + HFA_PREFETCH_BYTES / 2, 0, HFA_PREFETCH_LEVEL);
        UNROLL(4)
        for (int v = 0; v < VECTORS; v++) {
            vi low, high;
            load_codes(FORMAT, i, codes + v * 4 * VW, &low, &high);
            UNROLL(2)
            for (int p = 0; p < M / 2; p++) pairs[p][v] = v4_pair_dot(pairs[p][v], low, high, x.codes + 16 * p);
        }
    }
    UNROLL(4)
    for (int m = 0; m < M; m++)
        UNROLL(4)
        for (int v = 0; v < VECTORS; v++) sum[m][v] = v4_pair_row(pairs[m / 2][v], m % 2);
}

/* The same of weights of 8 bits and codes of 16: products with the high bytes of a block first, eight rows of W at a time. */
HFA_INLINE void wide_block_in_pairs(const int M, const char *codes, rounded_rows x, vi sum[TILE_ROWS][MOST_V]) {
    v8_codes both[TILE_ROWS / 2][PER_BLOCK];
    UNROLL(2)
    for (int p = 0; p < M / 2; p++)
        UNROLL(4)
        for (int i = 0; i < PER_BLOCK; i++) both[p][i] = v8_codes_of(x.codes + 8 * p + i * 16 * x.g, 4 * x.g);
    for (int i = 0; i < HFA_QUANTUM * HFA_LANES; i += 64) __builtin_prefetch(codes + i + HFA_PREFETCH_BYTES / 2, 0, HFA_PREFETCH_LEVEL);
    UNROLL(2)
    for (int half = 0; half < 2; half++) {
        int8x16_t rows[PER_BLOCK][4];
        UNROLL(4)
        for (int i = 0; i < PER_BLOCK; i++) v8_rows(codes + i * 8 * HFA_LANES + 16 * half, rows[i]);
        UNROLL(2)
        for (int p = 0; p < M / 2; p++) {
            vi sums[4];
            UNROLL(4)
            for (int q = 0; q < 4; q++) {
                sums[q] = vi_zero();
                UNROLL(4)
                for (int i = 0; i < PER_BLOCK; i++) sums[q] = vmmlaq_s32(sums[q], both[p][i].high, rows[i][q]);
                sums[q] = vshlq_n_s32(sums[q], 8);
                UNROLL(4)
                for (int i = 0; i < PER_BLOCK; i++) sums[q] = vusmmlaq_s32(sums[q], both[p][i].low, rows[i][q]);
            }
            UNROLL(4)
            for (int v = 0; v < 2; v++)
                UNROLL(2)
                for (int m = 0; m < 2; m++) sum[2 * p + m][2 * half + v] = v8_row(sums[2 * v], sums[2 * v + 1], m);
        }
    }
}
#endif

/* gcc would load what later columns of x need long before, and run out of registers */
#define LOADS_STAY if (S > 1) __asm__ volatile("" : : : "memory");

/* Weights of fewer than 8 bits. IS_SINGLE: groups are one block. */
HFA_INLINE void tile_few(const int FORMAT, const int M, const int S, const int IS_SINGLE, const hfa_matrix *w, int64_t row, int64_t rows,
                         rounded_rows x, float *out, int64_t ldo) {
    const int BITS = hfa_code_bits(FORMAT);
    BEGIN_TILE(FORMAT)
    FOR_BLOCKS {
        TILE_BEGINS_BLOCK
        v4 sum[TILE_ROWS][MOST_V];
#ifdef HFA_PAIRS_OF_ROWS
        if (S == 1 && M % 2 == 0) {
            block_in_pairs(FORMAT, M, codes, x, sum);
            codes += BITS * HFA_QUANTUM * HFA_LANES / 8;
            x.codes += HFA_QUANTUM * x.g;
            ADD_BLOCK(v4_end(sum[m][v]))
            continue;
        }
#endif
        UNROLL(8)
        for (int m = 0; m < M; m++) {
            v4 start = v4_begin(vi_repeat(x.start + m));
            UNROLL(4)
            for (int v = 0; v < V; v++) sum[m][v] = start;
        }
        UNROLL(4)
        for (int i = 0; i < PER_BLOCK; i++, x.codes += 8 * x.g) {
            vi low[MOST_V], high[MOST_V];
            if (i < BITS) AHEAD(i * 4 * HFA_LANES)
            UNROLL(4)
            for (int v = 0; v < V; v++) load_codes(FORMAT, i, codes + v / VECTORS * code_strip + v % VECTORS * 4 * VW, &low[v], &high[v]);
            UNROLL(8)
            for (int m = 0; m < M; m++) {
                vi xl = vi_repeat(x.codes + 8 * m), xh = vi_repeat(x.codes + 8 * m + 4);
                UNROLL(4)
                for (int v = 0; v < V; v++) sum[m][v] = v4_dot(v4_dot(sum[m][v], low[v], xl), high[v], xh);
            }
            LOADS_STAY
        }
        codes += BITS * HFA_QUANTUM * HFA_LANES / 8;
        ADD_BLOCK(v4_end(sum[m][v]))
    }
    ADD_GROUP
    } /* of the group */
    store_tile(M, S, total, rows, out, ldo);
}

HFA_INLINE void tile_int8(const int M, const int S, const int IS_SINGLE, const hfa_matrix *w, int64_t row, int64_t rows, rounded_rows x,
                          float *out, int64_t ldo) {
    BEGIN_TILE(HFA_INT8)
    FOR_BLOCKS {
        TILE_BEGINS_BLOCK
        vi sum[TILE_ROWS][MOST_V];
#ifdef HFA_PAIRS_OF_ROWS
        if (S == 1 && M % 2 == 0) {
            wide_block_in_pairs(M, codes, x, sum);
            codes += HFA_QUANTUM * HFA_LANES;
            x.codes += 2 * HFA_QUANTUM * x.g;
            ADD_BLOCK(vi_float(sum[m][v]))
            continue;
        }
#endif
        UNROLL(8)
        for (int m = 0; m < M; m++)
            UNROLL(4)
            for (int v = 0; v < V; v++) sum[m][v] = vi_zero();
        UNROLL(16)
        for (int i = 0; i < HFA_QUANTUM / 2; i++, codes += 2 * HFA_LANES, x.codes += 4 * x.g) {
            vi wide[MOST_V];
            if (i % 2 == 0) AHEAD(i * 2 * HFA_LANES)
            UNROLL(4)
            for (int v = 0; v < V; v++) wide[v] = vi_load_int8(codes + v / VECTORS * code_strip + v % VECTORS * 2 * VW);
            UNROLL(8)
            for (int m = 0; m < M; m++) {
                vi both = vi_repeat(x.codes + 4 * m);
                UNROLL(4)
                for (int v = 0; v < V; v++) sum[m][v] = vi_dot16(sum[m][v], wide[v], both);
            }
            LOADS_STAY
        }
        ADD_BLOCK(vi_float(sum[m][v]))
    }
    ADD_GROUP
    } /* of the group */
    store_tile(M, S, total, rows, out, ldo);
}

#if VW == 16
#include "bodies/apart_body.h"
#define GOES_APART(FORMAT) ((FORMAT) != HFA_INT8 && m >= APART_FROM && goes_together && count == BOTH && w->group > HFA_QUANTUM && STRETCH % w->group == 0 && w->inner % w->group == 0)
#else
#define GOES_APART(FORMAT) 0
#define dot_apart(...)
#endif

/* A tile of its own for every number of rows. */
#define TILE_FOR(M, TILE, S, IS_SINGLE) case M: TILE(M, S, IS_SINGLE, w, row + n, count, x, to, ldo); break;
#define TILES(TILE)                                                                                                   \
    switch (some) {                                                                                                   \
        case 1:                                                                                                       \
            if (g == 1) { /* the steps of a single row, known to the compiler */                                      \
                x.g = 1;                                                                                              \
                TILE(1, 1, 0, w, row + n, count, x, to, ldo);                                                         \
                break;                                                                                                \
            }                                                                                                         \
            TILE(1, 1, 0, w, row + n, count, x, to, ldo);                                                             \
            break;                                                                                                    \
        TILE_FOR(2, TILE, 1, 0) TILE_FOR(3, TILE, 1, 0) TILE_FOR(4, TILE, 1, 0)                                       \
    }
#if VW == 16
#define UP_TO_4(TILE, IS_SINGLE)                                                                                      \
    TILE_FOR(1, TILE, 2, IS_SINGLE) TILE_FOR(2, TILE, 2, IS_SINGLE) TILE_FOR(3, TILE, 2, IS_SINGLE) TILE_FOR(4, TILE, 2, IS_SINGLE)
#define UP_TO_8(TILE, IS_SINGLE)                                                                                      \
    TILE_FOR(5, TILE, 2, IS_SINGLE) TILE_FOR(6, TILE, 2, IS_SINGLE) TILE_FOR(7, TILE, 2, IS_SINGLE) TILE_FOR(8, TILE, 2, IS_SINGLE)
#define TILES_TOGETHER(TILE, IS_FEW)                                                                                  \
    if (!(IS_FEW)) switch (some) { UP_TO_4(TILE, 0) UP_TO_8(TILE, 0) }                                                \
    else if (w->group != HFA_QUANTUM) switch (some) { UP_TO_4(TILE, 0) }                                              \
    else switch (some) { UP_TO_4(TILE, 1) UP_TO_8(TILE, 1) }
#else
#define TILES_TOGETHER(TILE, IS_FEW) {}
#endif

/* 16 or 32 rows of W at a time meet all rows of x, so that they are read from memory once */
#define PACKED_DOT(NAME, FORMAT, TILE, BYTES)                                                                                 \
    static void NAME(const hfa_matrix *w, int64_t row, int64_t rows, const void *packed, int m, float *out, int64_t ldo) { \
        size_t row_bytes = (size_t)(hfa_padded(w->inner) * (BYTES) + hfa_padded(w->inner) / HFA_QUANTUM * 12);        \
        for (int64_t n = 0, together; n < rows; n += together) {                                                      \
            int goes_together = STRIPS > 1 && m > 1 && rows - n > HFA_LANES;                                          \
            together = goes_together ? STRIPS * HFA_LANES : HFA_LANES;                                                \
            int64_t count = rows - n < together ? rows - n : together;                                                \
            if (GOES_APART(FORMAT)) {                                                                                 \
                dot_apart(FORMAT, w, row + n, packed, m, out + n, ldo);                                               \
                continue;                                                                                             \
            }                                                                                                         \
            for (int m0 = 0, some; m0 < m; m0 += some) {                                                              \
                int inside = m0 % HFA_ROUNDED_ROWS, first = m0 - inside;                                              \
                int g = m - first < HFA_ROUNDED_ROWS ? m - first : HFA_ROUNDED_ROWS;                                  \
                rounded_rows x = rows_of_group((const char *)packed + row_bytes * (size_t)first, g, inside, w->inner, BYTES); \
                float *to = out + n + m0 * ldo;                                                                       \
                int most = goes_together && ((BYTES) == 2 || w->group == HFA_QUANTUM) ? TILE_ROWS : 4; /* with sums of groups, registers run out */ \
                some = g - inside < most ? g - inside : most;                                                         \
                if (!goes_together) TILES(TILE)                                                                       \
                else TILES_TOGETHER(TILE, (BYTES) == 1)                                                               \
            }                                                                                                         \
        }                                                                                                             \
    }
#define TILE_INT4(...) tile_few(HFA_INT4, __VA_ARGS__)
#define TILE_INT3(...) tile_few(HFA_INT3, __VA_ARGS__)
#define TILE_INT2(...) tile_few(HFA_INT2, __VA_ARGS__)
#define TILE_FP4(...) tile_few(HFA_FP4, __VA_ARGS__)
PACKED_DOT(dot_int8, HFA_INT8, tile_int8, 2)
PACKED_DOT(dot_int4, HFA_INT4, TILE_INT4, 1)
PACKED_DOT(dot_int3, HFA_INT3, TILE_INT3, 1)
PACKED_DOT(dot_int2, HFA_INT2, TILE_INT2, 1)
PACKED_DOT(dot_fp4, HFA_FP4, TILE_FP4, 1)
#undef TILE_INT4
#undef TILE_INT3
#undef TILE_INT2
#undef TILE_FP4
#undef TILE_FOR
#undef TILES
#undef TILES_TOGETHER
#undef UP_TO_4
#undef UP_TO_8
#undef GOES_APART
#undef dot_apart
#undef PACKED_DOT
#undef BEGIN_TILE
#undef TILE_BEGINS_BLOCK
#undef AHEAD
#undef LOADS_STAY
#undef FOR_BLOCKS
#undef ADD_BLOCK
#undef ADD_GROUP
