/* The table of inner kernels: one entry per (instruction set, dtype). Drivers are plain C and know only this table.
 *
 * Packed activations. `dot` wants its M rows of x packed: K is padded with zeros to a multiple of `step`, rows go in
 * groups of HFA_PACK_ROWS (the last group may be smaller), and inside a group of g rows the order is
 * [K/step][g][step]: the inner loop then walks one pointer with constant offsets. The element type (fp32, or bf16
 * where the machine multiplies bf16) and the order of the `step` elements are the kernel's own business.
 */
#ifndef HFA_KERNELS_H
#define HFA_KERNELS_H
#include <stddef.h>
#include "native.h"

#define HFA_PREFETCH_BYTES 16384 /* how far ahead; from 8 to 64 KB measured alike, 16 KB wastes least at the end */
#define HFA_PREFETCH_LEVEL 2     /* into L2: L1 is too small for this distance */
#define HFA_PACK_ROWS 8
#define HFA_DOT_ROWS 16 /* rows of x that meet a dense weight together */
#define HFA_PIECE 256 /* positions of K and V per attention task: 64 KB at D = 64 in 16 bits */
#define HFA_SECTION 256 /* words of x that lanes meet before the next: a block of them stays in L1, and short chains of additions err less */
#define HFA_PANEL_ROWS 60 /* rows of W that go over a panel of x: a multiple of 2, 3 and 4 */

#define HFA_TWISTER_WORDS 624 /* of the state of MT19937 */
#define HFA_STRETCH 1024 /* positions of K and V that are made ready for all queries of a task: they stay in L2 */
#define HFA_SPAN 128  /* ... that a block of queries meets together, at most: with their scores they stay in L1 */
#define HFA_STRIP 32  /* ... that lie together where operands are pairs: spans are whole strips */
/* Attention of many queries, see prompt_body.h and drivers/prompt.c. */
typedef struct {
    int block; /* queries that go together, one in a lane */
    int pairs; /* operands: 1: bf16, two in a word; 0: fp32 */
    void (*begin)(void); /* in a thread before the first, after the last of the others; NULL: nothing to do */
    void (*end)(void);
    void (*transpose)(const void *words, int64_t stride, int64_t rows, int64_t columns, void *out, int64_t to_stride);
    void (*read_codes)(int64_t format, const void *rows, int64_t stride, int64_t n, int64_t d, float *out, int64_t ldo);
    void (*read_codes_bf16)(int64_t format, const void *rows, int64_t stride, int64_t n, int64_t d, uint16_t *out, int64_t ldo);
    void (*pair_values)(const void *values, int64_t stride, int64_t n, int64_t d, void *out);
    void (*scores)(const void *keys, int64_t stride, int64_t n, int64_t words, const void *queries, float *scores);
    void (*softmax)(float *scores, int64_t n, float scale, float softcap, const float *first, const float *last, const float *hidden,
                    float *max, float *sum, float *keep, void *weights);
    void (*weigh)(const void *values, int64_t stride, int64_t n, int64_t d, const void *weights, const float *keep, float *out);
} hfa_prompt_kernels;

/* One token of a recurrent mixer, see recurrent_body.h and drivers/recurrent.c: tasks of sequence b. */
typedef struct {
    void (*conv)(const hfa_mixer *mixer, const hfa_mixer_call *call, int64_t b, int64_t begin, int64_t end, float *row);
    void (*delta)(const hfa_mixer *mixer, const hfa_mixer_call *call, int64_t b, int64_t head, const float *row, float *core);
    void (*ssd)(const hfa_mixer *mixer, const hfa_mixer_call *call, int64_t b, int64_t head, const float *row, float *core);
    void (*norm)(const hfa_mixer *mixer, const hfa_mixer_call *call, int64_t b, int64_t group, float *core);
    void (*scan)(const hfa_mixer *mixer, const hfa_mixer_call *call, int64_t b, int64_t begin, int64_t end);
} hfa_recurrent_kernels;

typedef struct {
    int step;        /* K padding of packed activations, elements */
    int packed_size; /* bytes of a packed element */
    int element;     /* bytes of a stored element */
    int rows_together; /* rows of W that `dot` likes to take at once: chunks are multiples of it */
    int panels_from; /* from so many rows of x on, `dot` likes HFA_PANEL_ROWS rows of W in a call */
    /* x [M, K] with a row stride in elements, stored dtype / fp32 that already holds dtype values */
    void (*pack)(const void *x, int64_t stride, int m, int64_t k, void *packed);
    void (*pack_f32)(const float *x, int64_t stride, int m, int64_t k, void *packed);
    /* out[m * ldo + n] = sum_k x[m, k] w[n * stride + k], n < rows */
    void (*dot)(const void *w, int64_t stride, int64_t rows, int64_t k, const void *packed, int m, float *out, int64_t ldo);
    /* out[m * ldo + n] += sum_k coef[m * ldc + k] w[k * stride + n], n < cols: Conv1D weights, values in attention */
    void (*axpy)(const void *w, int64_t stride, int64_t k, int64_t cols, const float *coef, int64_t ldc, int m, float *out,
                 int64_t ldo);
    void (*load)(const void *x, float *out, int64_t n);
    void (*store)(const float *x, void *out, int64_t n);
    void (*round)(float *x, int64_t n);                                    /* to the dtype, in place */
    void (*finish)(float *acc, const void *bias, int64_t n, void *out);     /* (acc + bias) rounded, stored */
    void (*finish_f32)(float *acc, const void *bias, int64_t n, float *out); /* the same, kept as fp32 */
    void (*norm)(const float *x, const hfa_norm *norm, int64_t n, float *out); /* x may be out */
    void (*gate)(int activation, const float *gate, const float *up, int64_t n, float *out); /* gate, up already rounded; up may be NULL: 1 */
    void (*add)(const float *a, const float *b, int64_t n, float *out);     /* rounded sum */
    /* x [head_dim], the first `rotary` rotated in place; cosine, sine fp32 */
    void (*rotate)(float *x, const float *cosine, const float *sine, int64_t rotary, float *scratch);
    /* scores -> scores * scale, soft-capped; 0, or NaN where one is not finite before it is capped */
    float (*scale_scores)(float *s, int64_t n, float scale, float softcap);
    float (*maximum)(const float *s, int64_t n);
    /* Packed weights. Rows of x are rounded to 16 bits (for int8) or 8 bits (for fewer) in blocks of HFA_QUANTUM columns
     * with a scale each, in groups of up to HFA_ROUNDED_ROWS rows: see rounding_body.h. x is fp32 [m, k]. */
    void (*round_for)(int64_t format, const float *x, int64_t stride, int m, int64_t k, void *rounded);
    /* by format: out[m * ldo + n] for rows n of W from row `row`, a multiple of HFA_LANES */
    void (*dot_packed[HFA_FORMATS])(const hfa_matrix *w, int64_t row, int64_t rows, const void *rounded, int m, float *out,
                                    int64_t ldo);
    /* Rows of a quantized cache, see cached.h; n <= HFA_PIECE, strides of rows in bytes. Scores of m queries:
     * out[m * ldo + n]; sums of codes: out[m * ldo + c] += sum_n coef[m * ldc + n] * code[n, c] */
    void (*dot_cached)(int64_t format, const void *rows, int64_t stride, int64_t n, int64_t d, const void *packed, int m, float *out,
                       int64_t ldo);
    void (*axpy_cached)(int64_t format, const void *rows, int64_t stride, int64_t n, int64_t d, const float *coef, int64_t ldc, int m,
                        float *out, int64_t ldo);
    /* NULL, or the same for HFA_MANY_ROWS rows of x or more, at most HFA_BAND in a call of dot_many. Rounded rows go in groups of 16;
     * `out` has room for whole HFA_BAND_ROWS of W. many_pairs: 0: results are the same to the last bit; 1: x stays bf16, of two bytes,
     * at most HFA_BAND_MOST rows go in a call, and sums are added up in another order. */
    void (*round_many)(int64_t format, const float *x, int64_t stride, int m, int64_t k, void *rounded);
    void (*dot_many[HFA_FORMATS])(const hfa_matrix *w, int64_t row, int64_t rows, const void *rounded, int m, float *out, int64_t ldo);
    int many_pairs;
    float (*exponentials)(float *s, int64_t n, float maximum); /* s = exp(s - maximum) in place, n % 16 == 0; their sum */
    const hfa_prompt_kernels *prompt;
    /* NULL, or for dense weights and blocks of HFA_MAX_ROWS rows of x, see lanes_body.h: out[n][HFA_MAX_ROWS] for n < rows of W, whose
     * stride is in words, as many as prompt->pairs says; of the lanes the first m are wanted. is_first: the block is the first that
     * these rows of W meet. */
    void (*lanes)(const void *w, int64_t stride, int64_t rows, int64_t words, const void *x, int m, int is_first, float *out);
    const hfa_recurrent_kernels *recurrent;
    void (*twist)(uint32_t *words); /* of a generator, see choose_body.h */
    int (*block_maxima)(const float *x, int64_t n, int64_t block, float *maxima);
    /* NULL, or as `lanes`, to the last bit, for blocks of x that begin `block` words apart: out[block][n][HFA_MAX_ROWS]. */
    void (*lanes_blocks)(const void *w, int64_t stride, int64_t rows, int64_t words, const void *x, int64_t block, int m, float *out);
    int packed_together; /* rows of W that `dot_packed` takes at once beside many rows of x */
} hfa_kernels;

extern const hfa_kernels hfa_kernels_portable[HFA_DTYPES];
#if defined(__x86_64__)
extern const hfa_kernels hfa_kernels_avx2[HFA_DTYPES], hfa_kernels_avx512[HFA_DTYPES], hfa_kernels_avx512_bf16[HFA_DTYPES];
/* AMX intrinsics came with gcc 11 and clang 12 */
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define HFA_HAS_AMX 1
const hfa_kernels *hfa_kernels_amx(void);
int hfa_amx_permitted(void);
#endif
#elif defined(__aarch64__)
extern const hfa_kernels hfa_kernels_neon[HFA_DTYPES], hfa_kernels_neon_dot[HFA_DTYPES], hfa_kernels_neon_i8mm[HFA_DTYPES];
#endif
const hfa_kernels *hfa_active_kernels(int dtype);

#define HFA_MANY_ROWS 48 /* of x: beside 33 tiles gain nothing, beside 17 they take up to 1.8 times as long */
#define HFA_BAND 128 /* rows of x that packed weights meet in a call, where there are many */
#define HFA_BAND_MOST 256 /* ... where W is dequantized for them: twice as many halve the time that takes */
#define HFA_BAND_ROWS 32
#define HFA_ROUNDED_ROWS 8 /* rows of x that are rounded together: what meets a packed weight at once where there are 32 vector registers */

static inline int64_t hfa_padded(int64_t k) { return (k + HFA_QUANTUM - 1) / HFA_QUANTUM * HFA_QUANTUM; }

static inline int hfa_code_bits(int64_t format) {
    static const int bits[HFA_FORMATS] = {[HFA_INT8] = 8, [HFA_INT4] = 4, [HFA_INT2] = 2, [HFA_INT3] = 3, [HFA_FP4] = 4};
    return bits[format];
}

/* Bytes of a scale of a packed weight. */
static inline int64_t hfa_scale_bytes(int64_t format, int64_t stride) { return format == HFA_FP4 ? 1 : stride == 1 ? 4 : 2; }

/* Bytes of m rows of x rounded for a packed format: codes, then per block of columns start, scale and sum. many: for `dot_many`. */
static inline int64_t hfa_rounded_rows(const hfa_kernels *kernels, int64_t format, int many, int64_t m, int64_t k) {
    int bytes = format == HFA_INT8 ? 2 : 1;
    if (many && kernels->many_pairs) return m * hfa_padded(k) * 2;
    return m * hfa_padded(k) * bytes + m * hfa_padded(k) / HFA_QUANTUM * 12;
}

/* Bytes of m rows of k elements once packed (64-byte aligned size). More than HFA_DOT_ROWS rows are packed that many at a
 * time: a group begins at the bytes of those before it. */
static inline size_t hfa_packed_bytes(const hfa_kernels *kernels, int m, int64_t k) {
    int64_t padded = (k + kernels->step - 1) / kernels->step * kernels->step;
    return (size_t)((padded * m * kernels->packed_size + 63) / 64 * 64);
}
#endif
