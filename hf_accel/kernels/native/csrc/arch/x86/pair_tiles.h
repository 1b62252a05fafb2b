/* Packed weights beside many rows of x in models of bf16, on AMX: blocks of W are dequantized to bf16, stay in L1, and meet all rows of
 * x by tile products of pairs. x is not rounded. Sums are added up in another order than beside few rows: results are not the same to the
 * last bit. A scale of whole rows, without offsets, multiplies their sums; others multiply W first, which is then rounded to bf16.
 *
 * Floor: 16 cycles for a tile product of 16 rows of x, 16 of W and 32 columns; four of them share four loads. Dequantizing takes a fifth
 * of the time beside 128 rows of x, an eighth beside 256. Tiles of bytes, whose sums are scaled for each 32 columns, take 2.2 times as long
 * with 8 bits and 1.5 times with 4. Also tried: codes in place of numbers, whose sums were scaled for each group of 64 columns: storing
 * these sums, and adding them, took a quarter of the time.
 *
 * x comes in groups of g <= 16 rows: bf16 [Kp / 32][g][32]. */
enum { PAIR_BLOCKS = 16 }; /* blocks of W that are dequantized together: 32 rows of it are 32 KB */
typedef uint16_t pair_tile[HFA_QUANTUM / 2][HFA_LANES][2];

static void pairs_many(int64_t format, const float *x, int64_t stride, int m, int64_t k, void *packed) {
    char *to = packed;
    (void)format;
    for (int m0 = 0; m0 < m; m0 += TILE_X)
        for (int64_t i = 0, g = m - m0 < TILE_X ? m - m0 : TILE_X; i < hfa_padded(k); i += HFA_QUANTUM)
            for (int r = 0; r < g; r++, to += HFA_QUANTUM * 2) {
                float room[HFA_QUANTUM];
                const float *block = block_of(x + (m0 + r) * stride, k, i, room);
                _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(vf_load(block + 16), vf_load(block)));
            }
}

/* What codes stand for, by their low four bits, before their scale. */
HFA_INLINE vf values_of(const int FORMAT) {
    if (FORMAT == HFA_FP4) /* codes are twice their values */
        return vf_mul(vi_float(_mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)fp4_codes)), _mm512_set1_epi32(FP4_HALF))), vf_set1(0.5f));
    const vi half = _mm512_set1_epi32(1 << (hfa_code_bits(FORMAT) - 1));
    return vi_float(_mm512_sub_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), half));
}

/* In each lane two numbers, rounded to bf16. */
HFA_INLINE vi pair_of(vf low, vf high) {
    const vi half = _mm512_set1_epi32(0x8000);
    vi a = _mm512_srli_epi32(_mm512_add_epi32((vi)low, half), 16), b = _mm512_add_epi32((vi)high, half);
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi32((int)0xffff0000), 0xf8); /* a | (b & mask) */
}

/* Codes of four columns, in the four bits from `shift` on of each byte. */
HFA_INLINE void store_pairs(vi codes, const int shift, vf values, const group_ends *e, int s, uint16_t (*to)[HFA_LANES][2]) {
    vf value[4];
    UNROLL(4)
    for (int c = 0; c < 4; c++) {
        value[c] = _mm512_permutexvar_ps(shift + c ? _mm512_srli_epi32(codes, shift + 8 * c) : codes, values);
        value[c] = e->has_offsets ? vf_fma(value[c], e->scale[s], e->offset[s]) : vf_mul(value[c], e->scale[s]);
    }
    _mm512_storeu_si512(to[0], pair_of(value[0], value[1]));
    _mm512_storeu_si512(to[1], pair_of(value[2], value[3]));
}

/* A block of 16 rows of W. */
HFA_INLINE void dequantize(const int FORMAT, const char *codes, const group_ends *e, int s, vf values, uint16_t (*to)[HFA_LANES][2]) {
    UNROLL(4)
    for (int i = 0; i < PER_BLOCK; i++, to += 4) {
        if (hfa_code_bits(FORMAT) == 4) {
            vi part = vi_load(codes + i * 4 * HFA_LANES);
            store_pairs(part, 0, values, e, s, to);
            store_pairs(part, 4, values, e, s, to + 2);
        } else {
            vi low, high;
            load_codes(FORMAT, i, codes, &low, &high);
            store_pairs(low, 0, values, e, s, to);
            store_pairs(high, 0, values, e, s, to + 2);
        }
    }
}

/* The same of 8 bits, of which two columns of 16 rows lie in 32 bytes. SCALES: else these numbers are whole. */
HFA_INLINE void dequantize_int8(const int SCALES, const char *codes, const group_ends *e, int s, uint16_t (*to)[HFA_LANES][2]) {
    const vi twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), others = _mm512_add_epi32(twice, _mm512_set1_epi32(8));
    UNROLL(4)
    for (int i = 0; i < HFA_QUANTUM / 2; i++, codes += 32) {
        vf value[2];
        for (int h = 0; h < 2; h++) {
            value[h] = vi_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + 16 * h))));
            if (!SCALES) continue;
            vf scale = _mm512_permutexvar_ps(h ? others : twice, e->scale[s]);
            value[h] = e->has_offsets ? vf_fma(value[h], scale, _mm512_permutexvar_ps(h ? others : twice, e->offset[s])) : vf_mul(value[h], scale);
        }
        _mm512_storeu_si512(to[i], (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]));
    }
}

/* Blocks [from, end) of two strips of W, as tiles want them. */
HFA_INLINE void lay_pairs(const int FORMAT, const int SCALES, const hfa_matrix *w, int64_t row, int strips, int64_t from, int64_t end, pair_tile (*to)[STRIPS]) {
    const int BITS = hfa_code_bits(FORMAT);
    int64_t blocks = hfa_padded(w->inner) / HFA_QUANTUM, per = w->group / HFA_QUANTUM, groups = (blocks + per - 1) / per;
    const char *codes = (const char *)w->weight + (row / HFA_LANES * blocks + from) * BITS * 4 * HFA_LANES;
    vf values = values_of(FORMAT == HFA_INT8 ? HFA_INT4 : FORMAT);
    group_ends e = ends_of(FORMAT, w, row, strips, groups, from / per);
    for (int64_t b = from; b < end; b++, codes += BITS * 4 * HFA_LANES, to++) {
        if (b % per == 0) e = ends_of(FORMAT, w, row, strips, groups, b / per);
        for (int s = 0; s < strips; s++) {
            const char *at = codes + s * blocks * BITS * 4 * HFA_LANES;
            for (int i = 0; i < BITS; i++) /* the strips after these */
                __builtin_prefetch(at + strips * blocks * BITS * 4 * HFA_LANES + i * 64, 0, HFA_PREFETCH_LEVEL);
            if (FORMAT == HFA_INT8) dequantize_int8(SCALES, at, &e, s, (*to)[s]);
            else dequantize(FORMAT, at, &e, s, values, (*to)[s]);
        }
    }
}

/* Tiles 0, 1: sums of the first rows of x, 2, 3: of the others; 4, 5: both of x; 6, 7: W [16 pairs][16 rows]. */
static void configure_pairs(int first, int others) {
    struct { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        int rows = tile > 5 ? HFA_QUANTUM / 2 : tile == 2 || tile == 3 || tile == 5 ? others : first;
        config.rows[tile] = (uint8_t)(rows ? rows : 1);
        config.row_bytes[tile] = 64;
    }
    publish(&config);
    _tile_loadconfig(&config);
}

/* Adds `count` blocks of two strips of W against two groups of rows of x, of which the second may be empty, to their sums. */
HFA_INLINE void add_pairs(const pair_tile (*w)[STRIPS], const char *x, const char *other, int g, int others, int64_t count, float *out, int64_t ldo) {
    float *below = out + g * ldo;
    _tile_loadd(0, out, ldo * 4);
    _tile_loadd(1, out + HFA_LANES, ldo * 4);
    if (others) {
        _tile_loadd(2, below, ldo * 4);
        _tile_loadd(3, below + HFA_LANES, ldo * 4);
    }
    for (int64_t c = 0; c < count; c++, x += g * 64, other += others * 64) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, w[c][0], 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w[c][1], 64);
        _tile_dpbf16ps(1, 4, 7);
        if (!others) continue;
        _tile_loadd(5, other, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, ldo * 4);
    _tile_stored(1, out + HFA_LANES, ldo * 4);
    if (others) {
        _tile_stored(2, below, ldo * 4);
        _tile_stored(3, below + HFA_LANES, ldo * 4);
    }
    publish(out);
}

HFA_INLINE void dot_pairs(const int FORMAT, const int SCALES, const hfa_matrix *w, int64_t row, int64_t rows, const char *x, int m, float *out, int64_t ldo) {
    _Alignas(64) pair_tile apart[PAIR_BLOCKS][STRIPS];
    int64_t blocks = hfa_padded(w->inner) / HFA_QUANTUM;
    int configured = 0;
    for (int64_t n = 0; n < rows; n += BOTH, out += BOTH) {
        int strips = rows - n > HFA_LANES ? 2 : 1;
        for (int i = 0; i < m; i++) memset(out + i * ldo, 0, BOTH * sizeof(float));
        for (int64_t from = 0, end; from < blocks; from = end) {
            end = from + PAIR_BLOCKS < blocks ? from + PAIR_BLOCKS : blocks;
            lay_pairs(FORMAT, SCALES, w, row + n, strips, from, end, apart);
            publish(apart);
            for (int m0 = 0; m0 < m; m0 += 2 * TILE_X) {
                int left = m - m0, g = left < TILE_X ? left : TILE_X, others = left - g < TILE_X ? left - g : TILE_X;
                const char *first = x + m0 * blocks * 64;
                if (g + others != configured) configure_pairs(g, others);
                configured = g + others;
                add_pairs((const void *)apart, first + from * g * 64, first + (blocks * g + from * others) * 64, g, others, end - from, out + m0 * ldo, ldo);
            }
        }
        if (SCALES) continue;
        group_ends e = ends_of(FORMAT, w, row + n, strips, 1, 0);
        for (int i = 0; i < m; i++)
            for (int s = 0; s < STRIPS; s++) {
                float *to = out + i * ldo + s * HFA_LANES;
                vf_store(to, vf_mul(vf_load(to), e.scale[s]));
            }
    }
    _tile_release();
}

static void pairs_int8(const hfa_matrix *w, int64_t row, int64_t rows, const void *packed, int m, float *out, int64_t ldo) {
    if (w->group >= w->inner && !w->offsets) dot_pairs(HFA_INT8, 0, w, row, rows, packed, m, out, ldo);
    else dot_pairs(HFA_INT8, 1, w, row, rows, packed, m, out, ldo);
}

#define DOT_PAIRS(NAME, FORMAT)                                                                                       \
    static void NAME(const hfa_matrix *w, int64_t row, int64_t rows, const void *packed, int m, float *out, int64_t ldo) { \
        dot_pairs(FORMAT, 1, w, row, rows, packed, m, out, ldo);                                                      \
    }
DOT_PAIRS(pairs_int4, HFA_INT4)
DOT_PAIRS(pairs_int3, HFA_INT3)
DOT_PAIRS(pairs_int2, HFA_INT2)
DOT_PAIRS(pairs_fp4, HFA_FP4)
#undef DOT_PAIRS
