/* Plain C interface of the native kernel library: what Python calls and the structs it fills.
 *
 * Layout of the library; every include names its file by the path from this folder
 *   native.h        this file: exported functions, argument structs, enumerations
 *   kernels.h       the table of inner kernels (one per dtype and instruction set) and how activations are packed
 *   cpu.c           which instruction sets this machine has, and which one is in use
 *   threads.[ch]    parallel regions in the OpenMP pool handed over by Python, barrier, chunk hand-out, scratch memory
 *   drivers/        the exported functions: plain C that calls the table of inner kernels
 *     linear.c      y = x W^T + b for up to 4 weights that share x; the transposed (Conv1D) layout
 *     packed.c      the same for weights of 8 to 2 bits and of MXFP4, and for any number of rows of x
 *     product.[ch]  products of several weights with one activation, cut into chunks for the threads
 *     block.c, block_attention.[ch], block_run.h   a whole decoder layer in one call
 *     step.c        one token through all layers of a decoder, its embedding and its head
 *     experts.c, route.c   the routed experts of a layer; their router
 *     recurrent.c   one token of a recurrent mixer
 *     attend.[ch], attention.c   one piece of attention; attention over parts of a cache
 *     prompt.c      attention of many queries, tile by tile
 *     cached.[ch]   rows of a quantized cache
 *     choose.c      chooses tokens: penalty, temperature, top-k, top-p, min-p, the draw
 *     stream.c      reads memory, to measure it
 *   bodies/         the inner kernels, written once over a vector type and included per instruction set
 *   arch/           per machine: vec_*.h, one fp32 vector type per instruction set, and isa_*.c, which compile the bodies
 *                   for one instruction set (by target pragmas, so no per-file compiler flags)
 *
 * Nothing here knows libtorch or Python; a call never keeps a pointer, and calls from several threads may overlap.
 */
#ifndef HFA_NATIVE_H
#define HFA_NATIVE_H
#include <stdint.h>

#define HFA_EXPORT __attribute__((visibility("default")))
#define HFA_ABI_VERSION 14
#define HFA_MAX_ROWS 32     /* activation rows of a call, where they are limited */
#define HFA_MAX_GROUP 4     /* weights that share one activation */
#define HFA_MAX_HEAD_DIM 256
#define HFA_MAX_STATE 256    /* rows and columns of a head's recurrent state */
#define HFA_MAX_TAPS 8       /* of a short convolution */
#define HFA_MIX_SOURCES 6    /* rows that a recurrent mixer's step reads */
#define HFA_LANES 16         /* rows of a packed weight that lie interleaved */
#define HFA_QUANTUM 32       /* columns of a packed weight come in multiples of this; activations are scaled per as many */

enum hfa_dtype { HFA_BF16 = 0, HFA_F16 = 1, HFA_F32 = 2, HFA_DTYPES = 3 };
enum hfa_isa { HFA_PORTABLE = 0, HFA_NEON = 1, HFA_AVX2 = 2, HFA_AVX512 = 3, HFA_AVX512_BF16 = 4, HFA_AMX = 5,
               HFA_NEON_DOT = 6, HFA_NEON_I8MM = 7, HFA_ISAS = 8 };
/* rows of a cache have one of the first HFA_CACHE_FORMATS */
enum hfa_format { HFA_DENSE = 0, HFA_INT8 = 1, HFA_INT4 = 2, HFA_CACHE_FORMATS = 3, HFA_INT2 = 3, HFA_INT3 = 4, HFA_FP4 = 5, HFA_FORMATS = 6 };
/* relu2: relu(x)^2; quick_gelu: x * sigmoid(1.702 x), every operation rounded; the last is no layer's own */
enum hfa_activation { HFA_SILU = 0, HFA_GELU_TANH = 1, HFA_GELU = 2, HFA_RELU = 3, HFA_RELU2 = 4, HFA_QUICK_GELU = 5, HFA_SIGMOID = 6 };
/* weight * round(x / rms); round(x / rms * (1 + weight)); round(x / rms * weight); round((x - mean) / deviation * weight + bias); the
 * same with round(1 + weight) */
enum hfa_norm_kind { HFA_NORM_NONE = 0, HFA_RMS = 1, HFA_RMS_UNIT = 2, HFA_RMS_ONCE = 3, HFA_LAYER_NORM = 4, HFA_LAYER_NORM_UNIT = 5 };
enum hfa_norm_extent { HFA_EACH_HEAD = 0, HFA_ALL_HEADS = 1, HFA_WHOLE_ROW = 2 };
enum hfa_rotary { HFA_NO_ROTARY = 0, HFA_HALVES = 1, HFA_PAIRS = 2, HFA_PAIRS_OF_HALVES = 3 };
enum hfa_part { HFA_LAYER = 0, HFA_HALF = 1, HFA_ATTENTION = 2 };
enum hfa_mix { HFA_MIX_CONV = 0, HFA_MIX_DELTA = 1, HFA_MIX_SSD = 2, HFA_MIX_SCAN = 3 };
enum hfa_mask { HFA_MASK_NONE = 0, HFA_MASK_BOOL = 1, HFA_MASK_ADD = 2 };

/* W [rows, inner], bias [rows] or NULL.
 * Dense: elements of the dtype, row stride in elements; of the last four fields only `group` is read: 1 if the weight lies transposed,
 *   [inner, rows], where `stride` is between these rows (GPT-2's Conv1D).
 * Packed, R = ceil(rows / 16), Kp = inner rounded up to 32, missing rows and columns zero:
 *   HFA_INT8  int8  [R, Kp / 2, 16, 2]: pairs of columns of 16 rows
 *   HFA_INT4  uint8 [R, Kp / 8, 16, 4]: byte j of a row holds column j in its low and column 4 + j in its high half, plus 8
 *   HFA_INT2  uint8 [R, Kp / 16, 16, 4]: byte j of a row holds columns j, 4 + j, 8 + j, 12 + j from its lowest bits on, plus 2
 *   HFA_INT3  uint8 [R, Kp / 32, 3, 16, 4]: byte j of part p holds columns 8 p + j and 8 p + 4 + j in its lowest six bits, plus
 *             4; the two bits above are the higher ones of column 24 + j (part 0) and 28 + j (1), and their lowest (2)
 *   HFA_FP4   as HFA_INT4, with fp4 values of E2M1 in the place of codes: three bits say 0, .5, 1, 1.5, 2, 3, 4, 6, the fourth
 *             the sign
 *   scales [R, groups, 16], bf16 (stride 0), fp32 (stride 1), fp16 (stride 3) or, with HFA_FP4 and nothing else, exponents e of
 *   a byte (stride 2), 2^(e - 127), not 255; offsets fp32 of the same shape, or NULL (always, with HFA_FP4); `group` columns share a scale:
 *   W = code * scale + offset. */
typedef struct {
    const void *weight; const void *bias; int64_t stride, rows, inner;
    const void *scales; const float *offsets; int64_t format, group;
} hfa_matrix;

/* Without a weight or a bias it multiplies by 1 and adds nothing. All fields here and below are 8 bytes wide so that Python can pack
 * them blindly. */
typedef struct { const void *weight, *bias; int64_t kind; double eps; } hfa_norm;

/* Where the heads of a projected row begin: head i of group g at start + g * stride + i * step. start < 0: there are none. */
typedef struct { int64_t start, stride, step; } hfa_heads;

/* One decoder layer: constant over its life. The rows of its projections, which read one input, make the projected row, one after
 * the other.
 *   part: HFA_HALF ends with the norm before the feed-forward part; HFA_ATTENTION gives the product of o, nothing added.
 *   Without a weight for gate the feed-forward part is activation(up), else activation(gate) * up.
 *   is_parallel: the feed-forward part reads mlp_norm(input), or what attention reads where there is no such norm, and what both
 *     give is summed before it joins the residual. Else without an input_norm (mlp_norm) the part reads the residual as it is.
 *   norm_extent: q_norm, k_norm and v_norm are of each head with one weight [D], with a weight per head [H, D] and [G, D], or over
 *     all heads of a row, which then lie side by side.
 *   rotary: of the first rotary_size columns of a head (0: as many as cos has), x[i] and x[i + half] turn by the angles i and
 *     i + half, or x[2 i] and x[2 i + 1] by the angle 2 i, or by the angle i. rotates_once: rounded once and not at every operation.
 *   k, v: none where keys and values lie in the buffers already. v may be where k is: values are then what keys are before their
 *     norm and their rotary.
 *   output_gate: what attention gives is multiplied by the sigmoid of it.
 *   residual_scale: what a part of the layer gives is multiplied by it, and rounded, before it joins the residual; out_scale: the
 *     layer's result is. 1: they are not.
 *   sinks [H]: a score more in each softmax, without a value, fp32 or of the dtype; slopes [H]: times the column, added to scores. */
typedef struct {
    int64_t dtype, part, hidden, heads, kv_heads, head_dim, inner, activation, is_parallel;
    int64_t norm_extent, norms_after_rotary, rotary, rotary_size, rotates_once, sinks_are_f32, projections;
    double scale, softcap, residual_scale, out_scale; /* softcap 0: none */
    hfa_heads q, k, v, output_gate;
    hfa_matrix projection[HFA_MAX_GROUP], o, gate, up, down;
    hfa_norm input_norm, attention_out_norm, mlp_norm, mlp_out_norm, q_norm, k_norm, v_norm;
    const void *sinks; const float *slopes;
} hfa_block;

/* What changes from call to call; strides in elements. hidden, out [B,T,E] contiguous, out of HFA_ATTENTION as wide as o has rows;
 * cos, sin [Bc,T,angles], not read without rotary;
 * keys, values buffers [B,G,C,D] with the last dimension contiguous; mask [Bm,1,T,S] with S = past + T - first.
 * row_past [B] or NULL: sequences of different lengths. Sequence b then writes row_past[b]..row_past[b] + T - 1 and
 * attends to nothing beyond, whatever the mask says; first <= row_past[b] <= past. NULL: all are at `past`.
 * rows [B] or NULL: sequence b lies in buffers of its own, [G,C,D], and each of its tokens sees what is there from `first` on, up to itself.
 * keys, values and their strides are then not read, and there is neither a mask nor row_past; first <= rows[b].first <=
 * rows[b].past <= past. angles_at [B] or NULL: sequence b takes the angles of sequence angles_at[b] of cos and sin, and not of b. */
typedef struct {
    void *keys, *values;
    int64_t key_stride_g, key_stride_s, value_stride_g, value_stride_s, past, first;
} hfa_row;
typedef struct {
    const void *hidden; void *out; const void *cos, *sin; void *keys, *values; const void *mask;
    int64_t batch, tokens, past, first, threads;
    int64_t angles, cos_stride_b, cos_stride_t, sin_stride_b, sin_stride_t;
    int64_t key_stride_b, key_stride_g, key_stride_s, value_stride_b, value_stride_g, value_stride_s;
    int64_t mask_kind, mask_stride_b, mask_stride_t;
    const int64_t *row_past;
    int64_t format; /* of keys and values: HFA_DENSE, or rows of bytes as in cached.h, whose strides are in bytes */
    void *normed;   /* [B,T,E], of an attention half: what its feed-forward part reads; `out` is the residual then */
    int64_t angles_are_f32; /* cos and sin; else of the dtype */
    const hfa_row *rows;
    const int64_t *angles_at;
} hfa_block_call;

/* Attention over a piece of a cache, to be merged with others. query [B,H,T,D]; keys [B,G,n,D] and values [B,G,n,Dv] as in
 * hfa_block_call; mask NULL or bool [Bm,Hm,T,n] with Hm 1 or H (stride 0 where 1). State, fp32 and contiguous: out [B,H,T,Dv] values weighted by
 * exp(score - max), max and sum [B,H,T] of these weights; `fresh`: there was nothing before. */
typedef struct {
    const void *query, *keys, *values, *mask; float *out, *max, *sum;
    int64_t dtype, format, batch, tokens, heads, kv_heads, key_dim, value_dim, positions, fresh, threads;
    int64_t query_stride_b, query_stride_h, query_stride_t, key_stride_b, key_stride_g, key_stride_s;
    int64_t value_stride_b, value_stride_g, value_stride_s, mask_stride_b, mask_stride_h, mask_stride_t;
    double scale, softcap;
} hfa_attend_call;

/* Attention of many queries: out [B,T,H,Dv] of the dtype, or of fp32 where `is_f32`. Keys [B,G,S,...] and values as in
 * hfa_attend_call. Query t stands at column past + t: with is_causal it sees nothing beyond, with window > 0 nothing at
 * past + t - window and before; starts [B] or NULL: nothing before starts[b]; mask NULL or bool [Bm,Hm,T,S]. sinks [H] or NULL:
 * a score more in each softmax, without a value. slopes [H] or NULL: times the column, added to scores; not with softcap. totals [B,T,H] or NULL: logarithms of the sums of exponentials without sinks,
 * -inf for queries that see nothing, whose output is zero. */
typedef struct {
    const void *query, *keys, *values, *mask; void *out; float *totals; const int64_t *starts; const float *sinks, *slopes;
    int64_t dtype, format, batch, tokens, heads, kv_heads, key_dim, value_dim, positions, past, is_causal, window, is_f32, threads;
    int64_t query_stride_b, query_stride_h, query_stride_t, key_stride_b, key_stride_g, key_stride_s;
    int64_t value_stride_b, value_stride_g, value_stride_s, mask_stride_b, mask_stride_h, mask_stride_t;
    double scale, softcap;
} hfa_prompt_call;

/* rows of x [outer, inner, d] with strides in elements to rows of a cache with strides in bytes; is_key as in cached.h */
typedef struct {
    const void *x; void *rows; int64_t dtype, format, outer, inner, d, is_key, threads;
    int64_t x_stride_o, x_stride_i, rows_stride_o, rows_stride_i;
} hfa_encode_call;

/* x [m, k] contiguous times `count` weights of one inner size k; out [m, rows] contiguous. Only `count` items are read. */
typedef struct { const void *weight, *bias; void *out; int64_t stride, rows; } hfa_group_item;
typedef struct { const void *x; int64_t dtype, m, k, threads, count; hfa_group_item item[HFA_MAX_GROUP]; } hfa_group;

/* The experts of a layer: y = down(gate(gate_up(x))). gate_up [2 I, E]: I rows of gate above I of up, or, interleaved, by turns;
 * down [E, I]. Dense ones may be transposed: then gate_up lies as [E, 2 I] and down as [I, E], stride is between those rows.
 * gate = min(gate, limit), up = clamp(up, -limit, limit) where limit > 0; then activation(gate) * up, or with alpha != 0
 * (up + 1) * gate * sigmoid(alpha * gate). All fields are 8 bytes wide. */
typedef struct {
    int64_t dtype, hidden, inner, experts, activation, interleaved, transposed;
    double alpha, limit;
    const hfa_matrix *gate_up, *down; /* [experts] */
} hfa_experts;

/* y [tokens, E] = sum over c of weights[t, c] * expert ids[t, c] of x [tokens, E]; an id out of range stands for no expert.
 * weights: of the dtype, then a weighted row is rounded to it, or fp32. counts [experts] or NULL: rows are added.
 * sums [tokens, E] or NULL: what the sums begin with, and where they are left: experts are summed in the order of their ids, so
 * that several calls with some of the experts each, in this order, make the same bits as one. */
typedef struct {
    const void *x; void *y; const int64_t *ids; const void *weights; int64_t *counts; float *sums;
    int64_t tokens, choices, weights_are_f32, threads;
} hfa_experts_call;

/* logits [tokens, experts] = x W^T + bias, of the dtype; ids [tokens, choices] of the highest in falling order; weights: softmax over
 * all logits, or, is_normed, over the chosen ones, which is the same divided by its sum over them; fp32 or of the dtype.
 * tokens <= HFA_MAX_ROWS. */
typedef struct {
    const void *x, *weight, *bias; void *logits, *weights; int64_t *ids;
    int64_t dtype, tokens, hidden, experts, stride, choices, is_normed, weights_are_f32, threads;
} hfa_route_call;

/* `count` values of a row that lie in chunks: value i is source[start + i / chunk * stride + i % chunk]. count 0: there are none. */
typedef struct { int64_t source, start, chunk, stride, count; } hfa_span;

/* What a recurrent mixer does for one token between its projections: constant over its life. All fields are 8 bytes wide.
 * A short convolution first, but for HFA_MIX_SCAN: channel c, of `part` after `part`, times `before` if there is one, joins the
 * conv_state, of which weight [channels, taps] makes its value, plus bias; silu of it where is_silu. Then
 *   HFA_MIX_CONV   times gate: out [channels]
 *   HFA_MIX_DELTA  parts: queries [groups, key_dim], keys [groups, key_dim], values [heads, value_dim]. Both of the first made unit
 *                  vectors, queries over sqrt(key_dim); state [heads, key_dim, value_dim] of fp32:
 *                  S = exp(-exp(a_log) softplus(rate + dt_bias)) S; S += k (v - k S) beta_scale sigmoid(beta); q S
 *   HFA_MIX_SSD    parts: x [heads, value_dim], B and C [groups, key_dim]. State [heads, value_dim, key_dim], dt = softplus(rate +
 *                  dt_bias): S = exp(-exp(a_log) dt) S + x dt B; S C + d x
 *   HFA_MIX_SCAN   no convolution; parts: x [heads], B and C [key_dim]. State [heads, key_dim], dt as before of each head and a_log
 *                  [heads, key_dim]: S = exp(-exp(a_log) dt) S + dt B x; (S C + d x) silu(gate)
 * and, of DELTA and SSD, a norm of groups of norm_size of the result's heads * value_dim values by root mean square, its weight
 * [norm_rows], repeated; times the sigmoid or silu of gate, before the norm where gates_first. rounds_once: not before weight and gate. norm_size
 * 0 (SSD): no norm, times silu(gate) if there is one. a_log and dt_bias of the dtype or of fp32, the latter for DELTA only. */
typedef struct {
    int64_t kind, dtype, channels, taps, is_silu, heads, groups, key_dim, value_dim;
    int64_t norm_size, norm_rows, gates_first, rounds_once, gate_is_sigmoid, a_log_is_f32, dt_bias_is_f32;
    double norm_eps, beta_scale;
    const void *conv_weight, *conv_bias, *a_log, *dt_bias, *d, *norm_weight;
    hfa_span part[3], before, gate, rate, beta;
} hfa_mixer;

/* One token of each sequence. Source s of sequence b begins step[s] * b elements after that of the first. States are contiguous and
 * written in place: conv_state [batch, channels, taps] of the dtype, state of fp32. decay [batch, heads, key_dim] or
 * NULL: of HFA_MIX_DELTA, logarithms of a factor per key in the place of the one above. out contiguous. */
typedef struct {
    const void *source[HFA_MIX_SOURCES]; int64_t step[HFA_MIX_SOURCES];
    const float *decay; void *conv_state; float *state; void *out;
    int64_t batch, threads;
} hfa_mixer_call;

/* The next token of each row of logits [rows, vocabulary], of the dtype, `stride` elements apart, as transformers' processors and
 * torch.multinomial choose it: penalty (0: none) on the ids [rows, length] from starts [rows] on (NULL: 0), temperature (0: none), top_k
 * (0: none), top_p (from 1 on: none), min_p (0: none), in this order. state: torch.get_rng_state() of a CPU, which is advanced as the draws of all
 * rows advance it; NULL: the token of the highest score after the penalty, nothing else is read. */
typedef struct {
    const void *logits; const int64_t *ids, *starts; void *state; int64_t *tokens;
    int64_t dtype, rows, vocabulary, stride, length, top_k;
    double penalty, temperature, top_p, min_p;
} hfa_choose_call;

/* A decoder of which a token runs in one call: constant but for its tables of angles. layer: of each its block and the rows of cos and sin by
 * position, [positions, angles] of the dtype or of fp32; NULL without rotary. embedding [vocabulary, hidden], times embedding_scale; then the
 * row position + positions_offset of positions [positions_rows, hidden], or NULL, is added. norm and head follow on the last layer;
 * logits times logit_scale, then softcap * tanh(logits / softcap) where it is not 0. Every operation is rounded. */
typedef struct { const hfa_block *block; const void *cos, *sin; int64_t angles, stride, are_f32; } hfa_step_layer;
typedef struct {
    int64_t dtype, layers, hidden, vocabulary;
    const void *embedding; int64_t embedding_stride; double embedding_scale;
    const void *positions; int64_t positions_stride, positions_offset, positions_rows;
    hfa_norm norm; hfa_matrix head; double logit_scale, softcap;
    const hfa_step_layer *layer;
} hfa_step;

/* A token of each of `count` sequences. choice [count]: the tokens, afterwards the best of the logits; position [count]. layer [layers]:
 * of each its keys and values, their strides and format, past and first, or its rows; the rest is written here. row [count, hidden] of
 * the dtype; room: twice the hidden size rounded up to 16, fp32; logits [count, rows of the head]. */
typedef struct {
    hfa_block_call *layer; void *row, *logits; float *room; int64_t *choice;
    const int64_t *position; int64_t count, threads;
} hfa_step_call;

HFA_EXPORT int hfa_abi_version(void);
HFA_EXPORT int hfa_isa_supported(int isa); /* compiled in, and this CPU and operating system have it */
HFA_EXPORT int hfa_isa(void);
HFA_EXPORT int hfa_set_isa(int isa);       /* 0, or -1 when not supported */
/* GOMP_parallel, omp_get_thread_num, omp_get_num_threads of the pool to use; NULL: everything runs serially. */
HFA_EXPORT void hfa_set_threading(void *parallel, void *thread_num, void *num_threads);
/* flags: dtype | transposed << 8 | threads << 16. Returns 0, or -1 for arguments out of range. m >= 1; transposed: m <= HFA_MAX_ROWS. */
HFA_EXPORT int hfa_linear(const void *x, const void *weight, const void *bias, void *y, int64_t m, int64_t k, int64_t n,
                          int64_t stride, int64_t flags);
HFA_EXPORT int hfa_linear_group(const hfa_group *group);
/* y [m, rows] = x [m, inner] W^T + bias for any m >= 1. flags: dtype of x, y, bias and a dense W | threads << 16. */
HFA_EXPORT int hfa_packed_linear(const void *x, const hfa_matrix *weight, void *y, int64_t m, int64_t flags);
/* Reads `bytes` (whole mebibytes, 64-byte aligned) with `threads` threads; for measuring the memory. */
HFA_EXPORT uint64_t hfa_stream(const void *data, int64_t bytes, int64_t threads);
HFA_EXPORT int hfa_attend(const hfa_attend_call *call);
HFA_EXPORT int hfa_prompt(const hfa_prompt_call *call); /* 0; -1 for arguments out of range or memory that is short */
HFA_EXPORT int hfa_mixer_step(const hfa_mixer *mixer, const hfa_mixer_call *call); /* 0; -1 for arguments out of range or no memory */
HFA_EXPORT int hfa_encode(const hfa_encode_call *call);
/* 0; -1 for arguments out of range; 1: the last of the highest logits is equal to the one after it, or some are no numbers */
HFA_EXPORT int hfa_route(const hfa_route_call *call);
/* 0; -1 for arguments out of range or no memory; 1: undecided, as rounding or the order of equal values decides, or as scores are NaN or
 * infinite. The state is written only with 0. */
HFA_EXPORT int hfa_choose(const hfa_choose_call *call);
/* Fills out [n] as torch fills it by exponential_(1) from this state of the generator, which is advanced; 0, or -1. */
HFA_EXPORT int hfa_exponentials(void *state, float *out, int64_t n);
HFA_EXPORT int hfa_experts_forward(const hfa_experts *layer, const hfa_experts_call *call); /* 0, or -1 for arguments out of range */
/* 0; -1 for arguments out of range; 1: there is no result, as a score of the attention is not finite, or as a mask or row_past asks
 * of more than HFA_MAX_ROWS rows, several of a sequence, what only as many can do: row_past, a summand, or to see beyond what a pass computes. */
HFA_EXPORT int hfa_block_forward(const hfa_block *block, const hfa_block_call *call);
HFA_EXPORT int hfa_step_forward(const hfa_step *step, const hfa_step_call *call); /* as hfa_block_forward */
#endif
