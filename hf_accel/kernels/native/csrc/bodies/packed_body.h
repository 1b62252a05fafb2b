/* Products with packed weights of 8 to 2 bits and of MXFP4; included once per instruction set.
 *
 * A lane is a row of W, so sums need no reduction over lanes and scales load as vectors. Per block of 32 columns the
 * products are summed exactly in integers, then scaled and added in fp32; a row's result is therefore the same to the
 * last bit however many rows of x there are. Rounded rows of x come in groups of g <= 4:
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

/* 32 values to integers in [-top, top]; returns the scale, NaN if a value is not finite. Adding 1.5 * 2^23 rounds to
 * the nearest integer, ties to even, into the low bits. */
HFA_INLINE float round_block(const float *x, float top, int32_t *codes) {
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
    for (int i = 0; i < HFA_QUANTUM; i++) codes[i] = (int32_t)(hfa_bits(x[i] * inverse + 12582912.0f) - 0x4b400000u);
    return largest / top + vf_sum(strange);
}

HFA_INLINE void load_block(const float *x, int64_t k, int64_t i, float *block) {
    int64_t n = k - i < HFA_QUANTUM ? k - i : HFA_QUANTUM;
    memcpy(block, x + i, (size_t)n * sizeof(float));
    for (; n < HFA_QUANTUM; n++) block[n] = 0.0f;
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
                float block[HFA_QUANTUM];
                int32_t codes[HFA_QUANTUM], sums[4] = {0};
                int8_t bytes[HFA_QUANTUM];
                load_block(x + (m0 + i) * stride, k, b * HFA_QUANTUM, block);
                float scale = unit * round_block(block, 127.0f, codes);
                for (int j = 0; j < HFA_QUANTUM; j++) bytes[j] = (int8_t)codes[j];
                for (int j = 0; j < HFA_QUANTUM; j += 4)
                    for (int c = 0; c < 4; c++) sums[c] += codes[j + c];
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
                float block[HFA_QUANTUM];
                int32_t codes[HFA_QUANTUM], sum = 0;
                load_block(x + (m0 + i) * stride, k, b * HFA_QUANTUM, block);
                float scale = round_block(block, 32767.0f, codes);
                char *to = r.codes + b * HFA_QUANTUM * 2 * g + i * 4;
                for (int j = 0; j < HFA_QUANTUM; j += 2) {
                    int16_t pair[2] = {(int16_t)codes[j], (int16_t)codes[j + 1]};
                    memcpy(to + j * 2 * g, pair, 4);
                    sum += pair[0] + pair[1];
                }
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

/* of the group: += sums * scale of x, and the sums of x */
#define ADD_BLOCK(VALUE)                                                                                              \
    UNROLL(4)                                                                                                         \
    for (int v = 0; v < VECTORS; v++) {                                                                               \
        UNROLL(4)                                                                                                     \
        for (int m = 0; m < M; m++) part[m][v] = vf_fma(VALUE, vf_set1(x.scale[b * M + m]), part[m][v]);              \
    }                                                                                                                 \
    if (offsets)                                                                                                      \
        for (int m = 0; m < M; m++) below[m] += x.sum[b * M + m];

/* totals += those of the group * its scale, and + its offset * sums of x */
#define ADD_GROUP                                                                                                     \
    UNROLL(4)                                                                                                         \
    for (int v = 0; v < VECTORS; v++) {                                                                               \
        vf scale = scale_bytes == 1   ? vf_load_exponents((const uint8_t *)scales + v * VW)                           \
                   : scale_bytes == 4 ? vf_load((const float *)scales + v * VW)                                       \
                   : w->stride == 3   ? vf_load_f16((const uint16_t *)scales + v * VW)                                \
                                      : vf_load_bf16((const uint16_t *)scales + v * VW);                              \
        UNROLL(4)                                                                                                     \
        for (int m = 0; m < M; m++) total[m][v] = vf_fma(part[m][v], scale, total[m][v]);                             \
        if (offsets)                                                                                                  \
            for (int m = 0; m < M; m++)                                                                               \
                total[m][v] = vf_fma(vf_load(offsets + v * VW), vf_set1(below[m]), total[m][v]);                      \
    }                                                                                                                 \
    __builtin_prefetch(scales + HFA_PREFETCH_BYTES / 16, 0, HFA_PREFETCH_LEVEL);                                      \
    scales += HFA_LANES * scale_bytes;                                                                                \
    offsets += offsets ? HFA_LANES : 0;

#define BEGIN_TILE(FORMAT, BYTES)                                                                                     \
    int64_t padded = hfa_padded(w->inner), part = row / HFA_LANES, groups = (padded + w->group - 1) / w->group;       \
    int64_t scale_bytes = hfa_scale_bytes(FORMAT, w->stride);                                                         \
    const char *codes = (const char *)w->weight + row * padded * hfa_code_bits(FORMAT) / 8;                            \
    const char *scales = (const char *)w->scales + part * groups * HFA_LANES * scale_bytes;                           \
    const float *offsets = w->offsets ? w->offsets + part * groups * HFA_LANES : NULL;                                \
    rounded x = rounded_parts(packed, M, w->inner, BYTES);                                                            \
    const char *xc = x.codes;                                                                                         \
    vf total[HFA_ROUNDED_ROWS][VECTORS];                                                                              \
    UNROLL(4)                                                                                                         \
    for (int m = 0; m < M; m++)                                                                                       \
        UNROLL(4)                                                                                                     \
        for (int v = 0; v < VECTORS; v++) total[m][v] = vf_set1(0.0f);

/* blocks b of every group */
#define FOR_BLOCKS                                                                                                    \
    for (int64_t b = 0, end = 0; b < padded / HFA_QUANTUM;) {                                                         \
        vf part[HFA_ROUNDED_ROWS][VECTORS];                                                                           \
        float below[HFA_ROUNDED_ROWS] = {0};                                                                          \
        UNROLL(4)                                                                                                     \
        for (int m = 0; m < M; m++)                                                                                   \
            UNROLL(4)                                                                                                 \
            for (int v = 0; v < VECTORS; v++) part[m][v] = vf_set1(0.0f);                                             \
        for (end += w->group / HFA_QUANTUM; b < end; b++)

HFA_INLINE void store_tile(const int M, vf total[HFA_ROUNDED_ROWS][VECTORS], int64_t rows, float *out, int64_t ldo) {
    for (int m = 0; m < M; m++) {
        float values[HFA_LANES];
        float *to = rows >= HFA_LANES ? out + m * ldo : values;
        for (int v = 0; v < VECTORS; v++) vf_store(to + v * VW, total[m][v]);
        if (rows < HFA_LANES) memcpy(out + m * ldo, values, (size_t)rows * sizeof(float));
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
HFA_INLINE void block_in_pairs(const int FORMAT, const int M, const char *codes, const char *xc, const int32_t *start,
                               v4 sum[HFA_ROUNDED_ROWS][VECTORS]) {
    v4_pair pairs[HFA_ROUNDED_ROWS / 2][VECTORS];
    UNROLL(2)
    for (int p = 0; p < M / 2; p++)
        UNROLL(4)
        for (int v = 0; v < VECTORS; v++) pairs[p][v] = v4_pair_begin(start + 2 * p);
    UNROLL(4)
    for (int i = 0; i < PER_BLOCK; i++, xc += 8 * M) {
        if (i < hfa_code_bits(FORMAT)) __builtin_prefetch(codes + i * 4 * HFA_LANES + HFA_PREFETCH_BYTES / 2, 0, HFA_PREFETCH_LEVEL);
        UNROLL(4)
        for (int v = 0; v < VECTORS; v++) {
            vi low, high;
            load_codes(FORMAT, i, codes + v * 4 * VW, &low, &high);
            UNROLL(2)
            for (int p = 0; p < M / 2; p++) pairs[p][v] = v4_pair_dot(pairs[p][v], low, high, xc + 16 * p);
        }
    }
    UNROLL(4)
    for (int m = 0; m < M; m++)
        UNROLL(4)
        for (int v = 0; v < VECTORS; v++) sum[m][v] = v4_pair_row(pairs[m / 2][v], m % 2);
}
#endif

/* Weights of fewer than 8 bits. */
HFA_INLINE void tile_few(const int FORMAT, const int M, const hfa_matrix *w, int64_t row, int64_t rows, const void *packed, float *out,
                         int64_t ldo) {
    const int BITS = hfa_code_bits(FORMAT);
    BEGIN_TILE(FORMAT, 1)
    FOR_BLOCKS {
        v4 sum[HFA_ROUNDED_ROWS][VECTORS];
#ifdef HFA_PAIRS_OF_ROWS
        if (M % 2 == 0) {
            block_in_pairs(FORMAT, M, codes, xc, x.start + b * M, sum);
            codes += BITS * HFA_QUANTUM * HFA_LANES / 8;
            xc += HFA_QUANTUM * M;
            ADD_BLOCK(v4_end(sum[m][v]))
            continue;
        }
#endif
        UNROLL(4)
        for (int m = 0; m < M; m++)
            UNROLL(4)
            for (int v = 0; v < VECTORS; v++) sum[m][v] = v4_begin(vi_repeat(x.start + b * M + m));
        UNROLL(4)
        for (int i = 0; i < PER_BLOCK; i++, xc += 8 * M) {
            vi low[VECTORS], high[VECTORS];
            if (i < BITS) __builtin_prefetch(codes + i * 4 * HFA_LANES + HFA_PREFETCH_BYTES / 2, 0, HFA_PREFETCH_LEVEL);
            UNROLL(4)
            for (int v = 0; v < VECTORS; v++) load_codes(FORMAT, i, codes + v * 4 * VW, &low[v], &high[v]);
            UNROLL(4)
            for (int m = 0; m < M; m++) {
                vi xl = vi_repeat(xc + 8 * m), xh = vi_repeat(xc + 8 * m + 4);
                UNROLL(4)
                for (int v = 0; v < VECTORS; v++) sum[m][v] = v4_dot(v4_dot(sum[m][v], low[v], xl), high[v], xh);
            }
        }
        codes += BITS * HFA_QUANTUM * HFA_LANES / 8;
        ADD_BLOCK(v4_end(sum[m][v]))
    }
    ADD_GROUP
    } /* of the group */
    store_tile(M, total, rows, out, ldo);
}

HFA_INLINE void tile_int8(const int M, const hfa_matrix *w, int64_t row, int64_t rows, const void *packed, float *out, int64_t ldo) {
    BEGIN_TILE(HFA_INT8, 2)
    FOR_BLOCKS {
        vi sum[HFA_ROUNDED_ROWS][VECTORS];
        UNROLL(4)
        for (int m = 0; m < M; m++)
            UNROLL(4)
            for (int v = 0; v < VECTORS; v++) sum[m][v] = vi_zero();
        UNROLL(16)
        for (int i = 0; i < HFA_QUANTUM / 2; i++, codes += 2 * HFA_LANES, xc += 4 * M) {
            vi wide[VECTORS];
            if (i % 2 == 0) __builtin_prefetch(codes + HFA_PREFETCH_BYTES / 2, 0, HFA_PREFETCH_LEVEL);
            UNROLL(4)
            for (int v = 0; v < VECTORS; v++) wide[v] = vi_load_int8(codes + v * 2 * VW);
            UNROLL(4)
            for (int m = 0; m < M; m++) {
                vi both = vi_repeat(xc + 4 * m);
                UNROLL(4)
                for (int v = 0; v < VECTORS; v++) sum[m][v] = vi_dot16(sum[m][v], wide[v], both);
            }
        }
        ADD_BLOCK(vi_float(sum[m][v]))
    }
    ADD_GROUP
    } /* of the group */
    store_tile(M, total, rows, out, ldo);
}

/* 16 rows of W at a time meet all rows of x, so that they are read from memory once */
#define PACKED_DOT(NAME, TILE, BYTES)                                                                                 \
    static void NAME(const hfa_matrix *w, int64_t row, int64_t rows, const void *packed, int m, float *out, int64_t ldo) { \
        size_t group_bytes = (size_t)(hfa_padded(w->inner) * HFA_ROUNDED_ROWS * (BYTES)                               \
                                      + hfa_padded(w->inner) / HFA_QUANTUM * 12 * HFA_ROUNDED_ROWS);                  \
        for (int64_t n = 0; n < rows; n += HFA_LANES) {                                                               \
            int64_t some = rows - n < HFA_LANES ? rows - n : HFA_LANES;                                               \
            const char *x = packed;                                                                                   \
            float *to = out + n;                                                                                      \
            for (int m0 = 0; m0 < m; m0 += HFA_ROUNDED_ROWS, x += group_bytes, to += HFA_ROUNDED_ROWS * ldo)          \
                switch (m - m0) {                                                                                     \
                    case 1: TILE(1, w, row + n, some, x, to, ldo); break;                                             \
                    case 2: TILE(2, w, row + n, some, x, to, ldo); break;                                             \
                    case 3: TILE(3, w, row + n, some, x, to, ldo); break;                                             \
                    default: TILE(4, w, row + n, some, x, to, ldo); break;                                            \
                }                                                                                                     \
        }                                                                                                             \
    }
#define TILE_INT4(...) tile_few(HFA_INT4, __VA_ARGS__)
#define TILE_INT3(...) tile_few(HFA_INT3, __VA_ARGS__)
#define TILE_INT2(...) tile_few(HFA_INT2, __VA_ARGS__)
#define TILE_FP4(...) tile_few(HFA_FP4, __VA_ARGS__)
PACKED_DOT(dot_int8, tile_int8, 2)
PACKED_DOT(dot_int4, TILE_INT4, 1)
PACKED_DOT(dot_int3, TILE_INT3, 1)
PACKED_DOT(dot_int2, TILE_INT2, 1)
PACKED_DOT(dot_fp4, TILE_FP4, 1)
#undef TILE_INT4
#undef TILE_INT3
#undef TILE_INT2
#undef TILE_FP4
#undef PACKED_DOT
#undef BEGIN_TILE
#undef FOR_BLOCKS
#undef ADD_BLOCK
#undef ADD_GROUP
