/* All kernels of one instruction set: an isa_*.c file includes its vec_*.h, then this, between target pragmas,
 * having defined TABLE (the name of the table) and ROWS_FOR(M) (rows of W computed together for M rows of x). For panels
 * (see product_body.h) also PANELS_FROM, the least rows of x for them, and PANEL_ROWS_FOR(G), rows of W beside a group of
 * G rows of x. PROMPT_VECTORS vectors of queries of a prompt go together, with PROMPT_ROWS keys or columns of values. */
#include "bodies/float_body.h"
#include "bodies/packed_body.h"
#include "bodies/cached_body.h"
#include "bodies/choose_body.h"

#define DTYPE 0
#include "bodies/dtype_body.h"
#define DTYPE 1
#include "bodies/dtype_body.h"
#define DTYPE 2
#include "bodies/dtype_body.h"

#define PAIRS 0
#include "bodies/prompt_body.h"
#if defined(HFA_DOT_BF16) && VW == 16
#define PAIRS 1
#include "bodies/prompt_body.h"
#define PROMPT_bf16 prompt_pairs
#else
#define PROMPT_bf16 prompt_words
#endif
#define PROMPT_f16 prompt_words
#define PROMPT_f32 prompt_words

#if VW == 16
#define PAIRS 0
#include "bodies/lanes_body.h"
#ifdef HFA_DOT_BF16
#define PAIRS 1
#include "bodies/lanes_body.h"
#define LANES_bf16 lanes_pairs
#define BLOCKS_bf16 lanes_blocks_pairs
#else
#define LANES_bf16 NULL
#define BLOCKS_bf16 NULL
#endif
#define LANES_f32 lanes_words
#define BLOCKS_f32 lanes_blocks_words
#else
#define LANES_bf16 NULL
#define LANES_f32 NULL
#define BLOCKS_bf16 NULL
#define BLOCKS_f32 NULL
#endif
#define LANES_f16 NULL
#define BLOCKS_f16 NULL

#define WITHOUT_PANELS (HFA_DOT_ROWS + 1)
#ifndef PANELS_FROM
#define FROM_bf16 WITHOUT_PANELS
#else
#define FROM_bf16 PANELS_FROM
#endif
#ifdef HFA_DOT_BF16
#define FROM_f16 WITHOUT_PANELS
#else
#define FROM_f16 FROM_bf16
#endif
#define FROM_f32 FROM_f16
#define TABLE_ENTRY(N)                                                                                                \
    {.step = STEP_##N, .packed_size = sizeof(packed_##N), .element = sizeof(element_##N), .rows_together = 4,         \
     .panels_from = FROM_##N, .pack = pack_##N,                                                                           \
     .pack_f32 = pack_f32_##N, .dot = dot_##N, .axpy = axpy_##N, .load = load_##N, .store = store_##N,                \
     .round = round_##N, .finish = finish_##N, .finish_f32 = finish_f32_##N, .norm = norm_##N,                        \
     .gate = gate_##N, .add = add_##N, .rotate = rotate_##N, .scale_scores = scale_scores, .maximum = maximum,        \
     .exponentials = exponentials, .round_for = round_for,                                                             \
     .dot_packed = {[HFA_INT8] = dot_int8, [HFA_INT4] = dot_int4, [HFA_INT2] = dot_int2, [HFA_INT3] = dot_int3,        \
                    [HFA_FP4] = dot_fp4},                                                                              \
     .dot_cached = dot_cached, .axpy_cached = axpy_cached, .prompt = &PROMPT_##N, .lanes = LANES_##N, .lanes_blocks = BLOCKS_##N, \
     .recurrent = &recurrent_##N, .twist = twist, .block_maxima = block_maxima,                            \
     .packed_together = STRIPS * HFA_LANES}

const hfa_kernels TABLE[HFA_DTYPES] = {TABLE_ENTRY(bf16), TABLE_ENTRY(f16), TABLE_ENTRY(f32)};
