/* Packed weights beside many rows of x, on AMX tiles of bytes: 16 rows of x, 32 of W and 32 columns at a time. The sums of these
 * are whole numbers, and what follows them is done in the order of packed_body.h: results are the same to the last bit.
 *
 * Floor: a tile product of 32 columns takes 16 cycles like one of 64, which a scale for each 32 does not allow; storing the sums
 * takes 16, and what follows them 36, as a thread that uses tiles has half of its 512-bit vectors. By dot products of bytes the
 * same takes 64 and 18. Measured: 1.3 to 1.5 times as fast; what follows the sums between the tile products instead of after
 * them is slower.
 *
 * x comes in groups of g <= 16 rows: int8 [Kp / 32][g][32], for weights of 8 bits the high bytes of its codes and the low ones,
 * [Kp / 32][2][g][32]; scales and sums as in rounding_body.h. A stretch of W is taken apart once for all rows of x. */
enum { TILE_X = 16, SOME = 4 }; /* SOME: blocks whose sums wait together, 8 KB of them in L1 */

/* Tiles 0..3: sums [g, 16]; 4: x [g, 32 bytes]; 5, 6: W [32 / 4][16 rows][4]. */
static void configure_bytes(int g) {
    struct { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 7; tile++) {
        config.rows[tile] = (uint8_t)(tile < 5 ? g : HFA_QUANTUM / 4);
        config.row_bytes[tile] = tile == 4 ? 32 : 64;
    }
    publish(&config);
    _tile_loadconfig(&config);
}

static void round_many(int64_t format, const float *x, int64_t stride, int m, int64_t k, void *packed) {
    const int is_wide = format == HFA_INT8, bytes = is_wide ? 2 : 1;
    char *at = packed;
    int64_t padded = hfa_padded(k);
    for (int m0 = 0; m0 < m; m0 += TILE_X) {
        int g = m - m0 < TILE_X ? m - m0 : TILE_X;
        rounded r = rounded_parts(at, g, k, bytes);
        for (int i = 0; i < g; i++)
            for (int64_t b = 0; b < padded / HFA_QUANTUM; b++) {
                float room[HFA_QUANTUM], scale;
                int32_t sums[4];
                int16_t codes[HFA_QUANTUM];
                const float *block = block_of(x + (m0 + i) * stride, k, b * HFA_QUANTUM, room);
                float inverse = inverse_scale(block, is_wide ? 32767.0f : 127.0f, &scale);
                char *to = r.codes + (b * bytes * g + i) * HFA_QUANTUM;
                if (is_wide) {
                    round_block(1, block, inverse, codes, sums);
                    __m512i both = _mm512_loadu_si512(codes);
                    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi16_epi8(_mm512_srai_epi16(both, 8)));
                    _mm256_storeu_si256((__m256i *)(to + g * HFA_QUANTUM), _mm512_cvtepi16_epi8(both));
                } else {
                    round_block(0, block, inverse, to, sums);
                }
                if (format == HFA_FP4) scale *= 0.5f;
                r.scale[b * g + i] = scale;
                r.sum[b * g + i] = scale * (float)(sums[0] + sums[1] + sums[2] + sums[3]);
            }
        at = (char *)(r.sum + g * padded / HFA_QUANTUM);
    }
}

/* Codes of two strips of W from column `from` on, signed, as tiles want them. */
HFA_INLINE void lay_apart(const int FORMAT, const hfa_matrix *w, int64_t row, int strips, int64_t from, int64_t blocks,
                          uint8_t to[][HFA_QUANTUM / 4][BOTH][4]) {
    const int BITS = hfa_code_bits(FORMAT);
    const vi half = _mm512_set1_epi8(FORMAT == HFA_FP4 ? FP4_HALF : 1 << (BITS - 1));
    int64_t padded = hfa_padded(w->inner), code_strip = padded * HFA_LANES * BITS / 8;
    for (int s = 0; s < strips; s++) {
        const char *codes = (const char *)w->weight + (row / HFA_LANES + s) * code_strip + from * HFA_LANES * BITS / 8;
        for (int64_t b = 0; b < blocks; b++, codes += HFA_QUANTUM * HFA_LANES * BITS / 8) {
            for (int i = 0; i < 2 * BITS; i++) /* the strips after these */
                if (i % 2 == 0) __builtin_prefetch(codes + strips * code_strip + i * 32, 0, HFA_PREFETCH_LEVEL);
            UNROLL(4)
            for (int i = 0; i < PER_BLOCK; i++) {
                vi low, high;
                if (FORMAT == HFA_INT8) { /* two columns of 16 rows in 32 bytes */
                    vi four[2];
                    for (int j = 0; j < 2; j++) {
                        __m256i first = _mm256_loadu_si256((const __m256i *)(codes + (4 * i + 2 * j) * 32));
                        __m256i second = _mm256_loadu_si256((const __m256i *)(codes + (4 * i + 2 * j + 1) * 32));
                        four[j] = _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
                    }
                    low = four[0], high = four[1];
                } else {
                    load_codes(FORMAT, i, codes, &low, &high);
                    low = _mm512_sub_epi8(low, half), high = _mm512_sub_epi8(high, half);
                }
                _mm512_storeu_si512(to[b][2 * i][s * HFA_LANES], low);
                _mm512_storeu_si512(to[b][2 * i + 1][s * HFA_LANES], high);
            }
        }
    }
}

typedef int32_t tile_sums[STRIPS][TILE_X][HFA_LANES];

#define BLOCK_SUMS(FIRST, SECOND, PRODUCT, X, TO)                                                                     \
    _tile_zero(FIRST);                                                                                                \
    _tile_zero(SECOND);                                                                                               \
    _tile_loadd(4, X, HFA_QUANTUM);                                                                                   \
    PRODUCT(FIRST, 4, 5);                                                                                             \
    PRODUCT(SECOND, 4, 6);                                                                                            \
    _tile_stored(FIRST, (TO)[0], 64);                                                                                 \
    _tile_stored(SECOND, (TO)[1], 64);

/* Sums of `count` blocks; high: of the high bytes of x, low: of the low ones, where it has two. */
HFA_INLINE void block_sums(const int IS_WIDE, const uint8_t (*w)[HFA_QUANTUM / 4][BOTH][4], const char *x, int g, int count, tile_sums *high,
                           tile_sums *low) {
    for (int c = 0; c < count; c++, x += (IS_WIDE ? 2 : 1) * g * HFA_QUANTUM) {
        _tile_loadd(5, w[c], BOTH * 4);
        _tile_loadd(6, w[c][0][HFA_LANES], BOTH * 4);
        if (IS_WIDE) {
            BLOCK_SUMS(0, 1, _tile_dpbssd, x, high[c])
            BLOCK_SUMS(2, 3, _tile_dpbusd, x + g * HFA_QUANTUM, low[c])
        } else if (c % 2) {
            BLOCK_SUMS(0, 1, _tile_dpbssd, x, high[c])
        } else {
            BLOCK_SUMS(2, 3, _tile_dpbssd, x, high[c])
        }
    }
    publish(high);
    publish(low);
}
#undef BLOCK_SUMS

/* What one row of W multiplies its sums by, and adds; for both strips. */
typedef struct { vf scale[STRIPS], offset[STRIPS]; int has_offsets; } group_ends;

HFA_INLINE group_ends ends_of(const int FORMAT, const hfa_matrix *w, int64_t row, int strips, int64_t groups, int64_t group) {
    group_ends e = {.has_offsets = w->offsets != NULL};
    int64_t scale_bytes = hfa_scale_bytes(FORMAT, w->stride);
    for (int s = 0; s < STRIPS; s++) {
        int64_t at = ((row / HFA_LANES + (s < strips ? s : 0)) * groups + group) * HFA_LANES;
        const char *scales = (const char *)w->scales + at * scale_bytes;
        e.scale[s] = scale_bytes == 1   ? vf_load_exponents((const uint8_t *)scales)
                     : scale_bytes == 4 ? vf_load((const float *)scales)
                     : w->stride == 3   ? vf_load_f16((const uint16_t *)scales)
                                        : vf_load_bf16((const uint16_t *)scales);
        e.offset[s] = w->offsets ? vf_load(w->offsets + at) : vf_set1(0.0f);
    }
    return e;
}

/* Adds the sums of COUNT blocks to those of their group, and these, where it ends, to the results. */
HFA_INLINE void add_sums(const int IS_WIDE, const int COUNT, const tile_sums *high, const tile_sums *low, const float *scale, const float *sum,
                         int g, int is_first, int is_last, const group_ends *e, float (*part)[STRIPS][HFA_LANES], float *below, float *out,
                         int64_t ldo) {
    for (int m = 0; m < g; m++, out += ldo) {
        vf all[STRIPS];
        for (int s = 0; s < STRIPS; s++)
            for (int c = 0; c < COUNT; c++) {
                vi of_block = _mm512_load_si512(high[c][s][m]);
                if (IS_WIDE) of_block = _mm512_add_epi32(_mm512_slli_epi32(of_block, 8), _mm512_load_si512(low[c][s][m]));
                vf value = vi_float(of_block), by = vf_set1(scale[c * g + m]);
                if (c == 0) all[s] = is_first ? vf_mul(value, by) : vf_fma(value, by, vf_load(part[m][s]));
                else all[s] = vf_fma(value, by, all[s]);
            }
        if (e->has_offsets) {
            float x = is_first ? 0.0f : below[m];
            for (int c = 0; c < COUNT; c++) x += sum[c * g + m];
            below[m] = x;
        }
        for (int s = 0; s < STRIPS; s++) {
            float *to = out + s * HFA_LANES;
            if (!is_last) {
                vf_store(part[m][s], all[s]);
                continue;
            }
            vf total = vf_fma(all[s], e->scale[s], vf_load(to));
            if (e->has_offsets) total = vf_fma(e->offset[s], vf_set1(below[m]), total);
            vf_store(to, total);
        }
    }
}

/* Blocks [from, end) of all K, which were taken apart at `w`, against g rows of x. */
HFA_INLINE void meet_tiles(const int FORMAT, const hfa_matrix *matrix, int64_t row, int strips, const uint8_t (*w)[HFA_QUANTUM / 4][BOTH][4],
                           int64_t from, int64_t end, const char *group_of_x, int g, float (*part)[STRIPS][HFA_LANES], float *below,
                           float *out, int64_t ldo) {
    const int IS_WIDE = FORMAT == HFA_INT8;
    _Alignas(64) tile_sums high[SOME], low[IS_WIDE ? SOME : 1];
    int64_t blocks = hfa_padded(matrix->inner) / HFA_QUANTUM, per = matrix->group / HFA_QUANTUM, groups = (blocks + per - 1) / per;
    rounded x = rounded_parts(group_of_x, g, matrix->inner, IS_WIDE ? 2 : 1);
    for (int64_t b = from, count; b < end; b += count) {
        int64_t group = b / per, stop = (group + 1) * per < blocks ? (group + 1) * per : blocks;
        count = stop - b < SOME ? stop - b : SOME;
        if (end - b < count) count = end - b;
        block_sums(IS_WIDE, w + (b - from), x.codes + b * g * (IS_WIDE ? 2 : 1) * HFA_QUANTUM, g, (int)count, high, low);
        int is_first = b == group * per, is_last = b + count == stop;
        group_ends e = ends_of(FORMAT, matrix, row, strips, groups, group);
        const float *scale = x.scale + b * g, *sum = x.sum + b * g;
        switch (count) {
            case 1: add_sums(IS_WIDE, 1, high, low, scale, sum, g, is_first, is_last, &e, part, below, out, ldo); break;
            case 2: add_sums(IS_WIDE, 2, high, low, scale, sum, g, is_first, is_last, &e, part, below, out, ldo); break;
            case 3: add_sums(IS_WIDE, 3, high, low, scale, sum, g, is_first, is_last, &e, part, below, out, ldo); break;
            default: add_sums(IS_WIDE, 4, high, low, scale, sum, g, is_first, is_last, &e, part, below, out, ldo); break;
        }
    }
}

HFA_INLINE void dot_tiles(const int FORMAT, const hfa_matrix *w, int64_t row, int64_t rows, const char *packed, int m, float *out, int64_t ldo) {
    enum { BLOCKS = STRETCH / HFA_QUANTUM };
    _Alignas(64) uint8_t codes[BLOCKS][HFA_QUANTUM / 4][BOTH][4];
    _Alignas(64) float part[HFA_BAND][STRIPS][HFA_LANES];
    float below[HFA_BAND];
    int64_t padded = hfa_padded(w->inner), blocks = padded / HFA_QUANTUM;
    size_t row_bytes = (size_t)(padded * (FORMAT == HFA_INT8 ? 2 : 1) + blocks * 12);
    int is_configured = 0;
    for (int64_t n = 0; n < rows; n += BOTH) {
        int strips = rows - n > HFA_LANES ? 2 : 1;
        for (int i = 0; i < m; i++) memset(out + n + i * ldo, 0, BOTH * sizeof(float));
        for (int64_t from = 0, end; from < blocks; from = end) {
            end = from + BLOCKS < blocks ? from + BLOCKS : blocks;
            lay_apart(FORMAT, w, row + n, strips, from * HFA_QUANTUM, end - from, codes);
            publish(codes);
            for (int m0 = 0; m0 < m; m0 += TILE_X) {
                int g = m - m0 < TILE_X ? m - m0 : TILE_X;
                if (g != is_configured) configure_bytes(is_configured = g);
                meet_tiles(FORMAT, w, row + n, strips, (const void *)codes, from, end, packed + row_bytes * (size_t)m0, g, part + m0, below + m0,
                           out + n + m0 * ldo, ldo);
            }
        }
    }
    _tile_release();
}

#define DOT_TILES(NAME, FORMAT)                                                                                       \
    static void NAME(const hfa_matrix *w, int64_t row, int64_t rows, const void *packed, int m, float *out, int64_t ldo) { \
        dot_tiles(FORMAT, w, row, rows, packed, m, out, ldo);                                                         \
    }
DOT_TILES(tiles_int8, HFA_INT8)
DOT_TILES(tiles_int4, HFA_INT4)
DOT_TILES(tiles_int3, HFA_INT3)
DOT_TILES(tiles_int2, HFA_INT2)
DOT_TILES(tiles_fp4, HFA_FP4)
#undef DOT_TILES
