/* bf16 products of 2 to 16 rows on AMX tiles, and products of many rows; everything else as AVX-512 with bf16 dot products does it.
 *
 * A tile of weights is 16 rows x 32 columns, loaded straight from memory with the row stride of W. The activations are
 * packed as the other operand wants them: per 32 columns of x, 16 pairs of columns, each pair for all m rows,
 * [K/32][16][m][2]. One tile product then serves all rows of x, so that 16 rows cost hardly more than one. Codes of packed
 * weights are taken apart by GFNI, and looked up by VBMI. */
#include "kernels.h"
#if HFA_HAS_AMX
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx512vbmi,gfni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx512vbmi,gfni,avx2,fma,f16c")
#endif
#include "arch/portable/scalar.h"
#define HFA_DOT_VNNI
#define HFA_BIT_MATRIX /* every CPU with AMX has GFNI and VBMI */
#define HFA_BYTE_PERMUTE
#include "arch/x86/vec_avx512.h"
#include "bodies/exp_body.h"
#include "bodies/packed_body.h"

/* Short rows (heads, tiny models) do not repay the set-up of tiles, and a single row of x is faster by plain dot products
 * (29 GB/s against 27 where memory gives 31); its sums come in another order then than those of 2 to 16 rows. */
enum { ROWS = 16, STEP = 32, LEAST_K = 512 };
static int is_small(int64_t k, int m) { return k < LEAST_K || m == 1; }

/* Linux hands out the tile registers only on request, once per process. */
int hfa_amx_permitted(void) {
#if defined(__linux__)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}

/* gcc's tile intrinsics do not say what they read: without this, stores to the memory at p could be dropped. */
HFA_INLINE void publish(const void *p) { __asm__ volatile("" : : "r"(p) : "memory"); }

/* Tiles 0, 1: sums [rows, m]; 2, 3: weights [rows, 32]; 4: activations [16 pairs, m]. */
HFA_INLINE void configure(int rows, int m) {
    struct { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 5; tile++) {
        config.rows[tile] = (uint8_t)(tile < 4 ? rows : STEP / 2);
        config.row_bytes[tile] = (uint16_t)(tile == 2 || tile == 3 ? 64 : m * 4);
    }
    publish(&config);
    _tile_loadconfig(&config);
}

/* sums and more [rows][m] added and transposed: out[j * ldo + r] */
HFA_INLINE void store_sums(const float *sums, const float *more, int rows, int m, float *out, int64_t ldo) {
    const __m512i column = _mm512_mullo_epi32(_mm512_set1_epi32(m), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    __mmask16 inside = (__mmask16)((1u << rows) - 1);
    for (int j = 0; j < m; j++) {
        __m512 a = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, column, sums + j, 4);
        __m512 b = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, column, more + j, 4);
        _mm512_mask_storeu_ps(out + j * ldo, inside, _mm512_add_ps(a, b));
    }
}

/* `rows` rows of W (at most 16, as configured) against all of x. Even and odd steps sum into two tiles, because a tile
 * product takes 52 cycles and the next one on the same sums waits for it. */
HFA_INLINE void dot_tile(const uint16_t *w, int64_t stride, int rows, int64_t k, const uint16_t *x, int m, float *out,
                         int64_t ldo) {
    const char *ahead = (const char *)w + HFA_PREFETCH_BYTES;
    float sums[ROWS * HFA_DOT_ROWS], more[ROWS * HFA_DOT_ROWS];
    int64_t i = 0;
    _tile_zero(0);
    _tile_zero(1);
    for (; i + 2 * STEP <= k; i += 2 * STEP, x += 2 * STEP * m) {
        UNROLL(4) /* every eighth line is enough: it starts the hardware prefetcher there */
        for (int line = 0; line < 2 * ROWS; line += 8) __builtin_prefetch(ahead + line * 64, 0, HFA_PREFETCH_LEVEL);
        ahead += 2 * ROWS * 64;
        _tile_loadd(4, x, m * 4);
        _tile_loadd(2, w + i, stride * 2);
        _tile_dpbf16ps(0, 2, 4);
        _tile_loadd(4, x + STEP * m, m * 4);
        _tile_loadd(3, w + i + STEP, stride * 2);
        _tile_dpbf16ps(1, 3, 4);
    }
    for (; i < k; i += STEP, x += STEP * m) {
        _tile_loadd(4, x, m * 4);
        if (i + STEP <= k) {
            _tile_loadd(2, w + i, stride * 2);
        } else { /* the rest of the rows, zero-padded: never reads beyond a row */
            uint16_t tail[ROWS * STEP];
            memset(tail, 0, sizeof tail);
            for (int r = 0; r < rows; r++) memcpy(tail + r * STEP, w + r * stride + i, (size_t)(k - i) * 2);
            publish(tail);
            _tile_loadd(2, tail, STEP * 2);
        }
        _tile_dpbf16ps(0, 2, 4);
    }
    _tile_stored(0, sums, m * 4);
    _tile_stored(1, more, m * 4);
    publish(sums);
    store_sums(sums, more, rows, m, out, ldo);
}

static void dot(const void *weight, int64_t stride, int64_t rows, int64_t k, const void *packed, int m, float *out, int64_t ldo) {
    const uint16_t *w = weight;
    if (is_small(k, m)) {
        hfa_kernels_avx512_bf16[HFA_BF16].dot(weight, stride, rows, k, packed, m, out, ldo);
        return;
    }
    int64_t n = 0;
    if (rows >= ROWS) {
        configure(ROWS, m);
        for (; n + ROWS <= rows; n += ROWS) dot_tile(w + n * stride, stride, ROWS, k, packed, m, out + n, ldo);
    }
    if (n < rows) {
        configure((int)(rows - n), m);
        dot_tile(w + n * stride, stride, (int)(rows - n), k, packed, m, out + n, ldo);
    }
    _tile_release();
}

/* x [m, k] -> [K/32][16][m][2]; `element` reads one bf16 of x */
#define PACK(ELEMENT)                                                                                                 \
    uint16_t *out = packed;                                                                                           \
    memset(out, 0, (size_t)((k + STEP - 1) / STEP * STEP * m) * 2);                                                   \
    for (int r = 0; r < m; r++)                                                                                       \
        for (int64_t i = 0; i < k; i++) out[(i / 2 * m + r) * 2 + i % 2] = ELEMENT(x[r * stride + i]);

#define SAME(value) (value)
#define TRUNCATED(value) ((uint16_t)(hfa_bits(value) >> 16)) /* x holds bf16 values: exact */

static void pack(const void *rows, int64_t stride, int m, int64_t k, void *packed) {
    const uint16_t *x = rows;
    if (is_small(k, m)) {
        hfa_kernels_avx512_bf16[HFA_BF16].pack(rows, stride, m, k, packed);
        return;
    }
    PACK(SAME)
}

static void pack_f32(const float *x, int64_t stride, int m, int64_t k, void *packed) {
    if (is_small(k, m)) {
        hfa_kernels_avx512_bf16[HFA_BF16].pack_f32(x, stride, m, k, packed);
        return;
    }
    PACK(TRUNCATED)
}

/* Attention of prompts: blocks of 32 queries, two tiles wide. Tiles 0..3: sums; 4, 5: keys or values; 6, 7: queries or weights. */
enum { BLOCK = 32, LINE = BLOCK * 4 };

static void prompt_begin(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        config.rows[tile] = 16;
        config.row_bytes[tile] = 64;
    }
    publish(&config);
    _tile_loadconfig(&config);
}

static void prompt_end(void) { _tile_release(); }

/* n whole strips of keys, whole steps of their words. Queries of 64 numbers stay in four tiles; then sums that wait to be stored
 * do not hold up those of the next keys, which the processor keeps in other registers of the same name. */
static void prompt_scores(const void *keys, int64_t stride, int64_t n, int64_t words, const void *queries, float *scores) {
    const char *a = keys, *b = queries;
    publish(keys);
    if (words == 32) {
        _tile_loadd(4, b, LINE);
        _tile_loadd(5, b + 64, LINE);
        _tile_loadd(6, b + 16 * LINE, LINE);
        _tile_loadd(7, b + 16 * LINE + 64, LINE);
        for (int64_t j = 0; j < n; j += 16, a += 16 * stride, scores += 16 * BLOCK) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_loadd(2, a, stride);
            _tile_loadd(3, a + 64, stride);
            _tile_dpbf16ps(0, 2, 4);
            _tile_dpbf16ps(1, 2, 5);
            _tile_dpbf16ps(0, 3, 6);
            _tile_dpbf16ps(1, 3, 7);
            _tile_stored(0, scores, LINE);
            _tile_stored(1, scores + 16, LINE);
        }
        publish(scores);
        return;
    }
    for (int64_t j = 0; j < n; j += HFA_STRIP, a += HFA_STRIP * stride, scores += HFA_STRIP * BLOCK) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t w = 0; w < words; w += 16) {
            _tile_loadd(4, a + 4 * w, stride);
            _tile_loadd(6, b + w * LINE, LINE);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b + w * LINE + 64, LINE);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + 16 * stride + 4 * w, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, scores, LINE);
        _tile_stored(1, scores + 16, LINE);
        _tile_stored(2, scores + 16 * BLOCK, LINE);
        _tile_stored(3, scores + 16 * BLOCK + 16, LINE);
    }
    publish(scores);
}

/* The unit of tile products falls asleep where it has nothing to do for about a thousand cycles, and takes 800 to wake; a product
 * whose sums nobody reads costs a hundred. (A thread that uses tiles has half of its 512-bit vectors meanwhile, so that scores
 * beside a softmax gain nothing.) */
#define PAIRS 1
#define ON(x) x##_amx
#define PROMPT_VECTORS 2
#define BETWEEN(j) if (j % 48 == 40) _tile_dpbf16ps(0, 2, 3)
#include "bodies/softmax_body.h"

static void prompt_weigh(const void *values, int64_t stride, int64_t n, int64_t d, const void *weights, const float *keep, float *out) {
    vf by[2] = {vf_load(keep), vf_load(keep + 16)};
    if (_mm512_cmp_ps_mask(_mm512_min_ps(by[0], by[1]), vf_set1(1.0f), _CMP_NEQ_UQ) || _mm512_cmp_ps_mask(_mm512_max_ps(by[0], by[1]), vf_set1(1.0f), _CMP_NEQ_UQ))
        for (int64_t c = 0; c < d; c++)
            for (int v = 0; v < 2; v++) vf_store(out + c * BLOCK + v * 16, vf_mul(vf_load(out + c * BLOCK + v * 16), by[v]));
    publish(out);
    for (int64_t c = 0; c < d; c += 32) {
        float *to = out + c * BLOCK;
        const char *a = (const char *)values + c * 64, *b = weights;
        int is_whole = c + 16 < d; /* rows come in sixteens */
        _tile_loadd(0, to, LINE);
        _tile_loadd(1, to + 16, LINE);
        if (is_whole) {
            _tile_loadd(2, to + 16 * BLOCK, LINE);
            _tile_loadd(3, to + 16 * BLOCK + 16, LINE);
        }
        for (int64_t j = 0; j < n; j += HFA_STRIP, a += stride * 64, b += 16 * LINE) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, b, LINE);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b + 64, LINE);
            _tile_dpbf16ps(1, 4, 7);
            if (!is_whole) continue;
            _tile_loadd(5, a + 16 * 64, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, to, LINE);
        _tile_stored(1, to + 16, LINE);
        if (is_whole) {
            _tile_stored(2, to + 16 * BLOCK, LINE);
            _tile_stored(3, to + 16 * BLOCK + 16, LINE);
        }
    }
    publish(out);
}

/* Products of blocks of 32 rows of x, see lanes_body.h: two tiles of W against two of x, so that each load serves two products. */
HFA_INLINE void lanes_tiles(const uint32_t *w, int64_t stride, int rows, int64_t words, const uint32_t *x, int m, int64_t ahead, int adds, float *out) {
    const int two = rows > 16, both = m > 16;
    if (adds) {
        publish(out);
        _tile_loadd(0, out, LINE);
        _tile_loadd(1, out + 16, LINE);
        if (two) {
            _tile_loadd(2, out + 16 * BLOCK, LINE);
            _tile_loadd(3, out + 16 * BLOCK + 16, LINE);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < words; i += 16, w += 16, x += 16 * BLOCK) {
        for (int r = 0; ahead && r < rows; r++) __builtin_prefetch(w + r * stride + ahead, 0, HFA_PREFETCH_LEVEL);
        _tile_loadd(4, w, stride * 4);
        _tile_loadd(6, x, LINE);
        _tile_dpbf16ps(0, 4, 6);
        if (two) {
            _tile_loadd(5, w + 16 * stride, stride * 4);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (!both) continue;
        _tile_loadd(7, x + 16, LINE);
        _tile_dpbf16ps(1, 4, 7);
        if (two) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, LINE);
    _tile_stored(1, out + 16, LINE);
    if (two) {
        _tile_stored(2, out + 16 * BLOCK, LINE);
        _tile_stored(3, out + 16 * BLOCK + 16, LINE);
    }
    publish(out);
}

static void lanes(const void *weight, int64_t stride, int64_t rows, int64_t words, const void *packed, int m, int is_first, float *out) {
    int64_t whole = rows / 16 * 16;
    publish(weight);
    for (int part = 0; part < 2; part++) { /* whole tiles, then the rest of the rows */
        int64_t from = part ? whole : 0, to = part ? rows : whole;
        if (from == to) continue;
        struct { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config;
        memset(&config, 0, sizeof config);
        config.palette = 1;
        for (int tile = 0; tile < 8; tile++) {
            config.rows[tile] = (uint8_t)(tile < 6 && part ? rows - whole : 16);
            config.row_bytes[tile] = 64;
        }
        publish(&config);
        _tile_loadconfig(&config);
        for (int64_t i = 0; i < words; i += HFA_SECTION) {
            int64_t some = words - i < HFA_SECTION ? words - i : HFA_SECTION, ahead = is_first ? rows * stride : 0;
            const uint32_t *w = (const uint32_t *)weight + i, *x = (const uint32_t *)packed + i * BLOCK;
            for (int64_t n = from; n < to;) {
                int together = to - n >= 32 ? 32 : part ? (int)(to - n) : 16;
                lanes_tiles(w + n * stride, stride, together, some, x, m, ahead, i > 0, out + n * BLOCK);
                n += together;
            }
        }
    }
    _tile_release();
}

#include "arch/x86/packed_tiles.h"
#include "arch/x86/pair_tiles.h"

static hfa_kernels table[HFA_DTYPES];
static hfa_prompt_kernels prompt;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void fill(void) {
    memcpy(table, hfa_kernels_avx512_bf16, sizeof table);
    for (int dtype = 0; dtype < HFA_DTYPES; dtype++) {
        table[dtype].round_for = round_for;
        table[dtype].dot_packed[HFA_INT8] = dot_int8;
        table[dtype].dot_packed[HFA_INT4] = dot_int4;
        table[dtype].dot_packed[HFA_INT3] = dot_int3;
        table[dtype].dot_packed[HFA_INT2] = dot_int2;
        table[dtype].dot_packed[HFA_FP4] = dot_fp4;
        table[dtype].round_many = round_many;
        table[dtype].dot_many[HFA_INT8] = tiles_int8;
        table[dtype].dot_many[HFA_INT4] = tiles_int4;
        table[dtype].dot_many[HFA_INT3] = tiles_int3;
        table[dtype].dot_many[HFA_INT2] = tiles_int2;
        table[dtype].dot_many[HFA_FP4] = tiles_fp4;
    }
    table[HFA_BF16].round_many = pairs_many;
    table[HFA_BF16].dot_many[HFA_INT8] = pairs_int8;
    table[HFA_BF16].dot_many[HFA_INT4] = pairs_int4;
    table[HFA_BF16].dot_many[HFA_INT3] = pairs_int3;
    table[HFA_BF16].dot_many[HFA_INT2] = pairs_int2;
    table[HFA_BF16].dot_many[HFA_FP4] = pairs_fp4;
    table[HFA_BF16].many_pairs = 1;
    prompt = *table[HFA_BF16].prompt;
    prompt.begin = prompt_begin;
    prompt.end = prompt_end;
    prompt.scores = prompt_scores;
    prompt.softmax = softmax_amx;
    prompt.weigh = prompt_weigh;
    table[HFA_BF16].prompt = &prompt;
    table[HFA_BF16].dot = dot;
    table[HFA_BF16].pack = pack;
    table[HFA_BF16].pack_f32 = pack_f32;
    table[HFA_BF16].rows_together = ROWS;
    table[HFA_BF16].panels_from = HFA_DOT_ROWS + 1;
    table[HFA_BF16].lanes = lanes;
    table[HFA_BF16].lanes_blocks = NULL;
}

const hfa_kernels *hfa_kernels_amx(void) {
    pthread_once(&once, fill);
    return table;
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
