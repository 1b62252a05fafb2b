/* State of a pass of a decoder layer call, shared by block.c and block_attention.c. A pass is `tokens` tokens from `token` on of
 * `batch` sequences from `sequence` on; b and t count within it, and row r = b * tokens + t. */
#ifndef HFA_BLOCK_RUN_H
#define HFA_BLOCK_RUN_H
#include "drivers/attend.h"
#include "drivers/product.h"

typedef struct {
    const hfa_block *block;
    const hfa_block_call *call;
    const hfa_kernels *kernels, *single; /* of the dtype; of fp32 */
    hfa_attention attention;
    int64_t sequence, batch, token, tokens;
    int rows, threads;                   /* R; ranges dealt out */
    int shares;                          /* more than HFA_MAX_ROWS rows: each thread prepares some of them for all */
    int is_prompt;                       /* shares, several tokens of each sequence in one buffer: attention in a region of its own */
    _Atomic int is_strange;              /* a score is not finite */
    hfa_barrier *barrier;
    hfa_range *ranges[5];                /* projections, attention, o, gate/up, down */
    hfa_products projections, output, gate_up, down; /* gate_up: of a gated part only to pack for */
    int64_t gate_rows;                   /* rows of gate (and of up) in a chunk */
    float *projected; int64_t projected_stride; /* [R, rows of the projections], rounded, before norm and rotary */
    float *summand; int64_t summand_stride; /* [R, E]: output of o, later of down, rounded */
    float *second;                       /* [R, E]: output of down; of sequential parts it is `summand` */
    float *inner;                        /* [R, I]: activation(gate) * up, rounded */
    float *sinks;                        /* [H] or NULL */
    int64_t queries;                     /* of a kv head */
    int64_t *tasks;                      /* [batch + 1]: of attention, those of the sequences before; [batch]: all of them */
    float *partial, *partial_max, *partial_sum; /* not is_prompt; per task and query: [D] weighted values, maximum score, sum */
    float *residual, *wide; char *packed; /* shares; as in hfa_block_private */
    int64_t *starts;                      /* is_prompt; [batch]: columns that left padding takes */
    char *query, *attended; float *totals; /* is_prompt; [R, H D] of the dtype, before and after attention; see hfa_prompt_call */
    char *private_memory; size_t private_bytes;
} hfa_block_run;

/* The first three are the thread's own or, shares, those of all. */
typedef struct {
    float *residual;  /* [R, E] */
    float *wide;      /* [R, max(E, H D)]: what is packed next */
    char *packed; hfa_activations x; /* of the product at hand, laid out in `packed` */
    int from, step;   /* the rows this thread prepares: HFA_DOT_ROWS from every step-th on */
    float *queries;   /* [HFA_QUERY_GROUP, D] */
    hfa_attend_room room; /* packed queries, scores */
    int64_t ready;    /* which sequence and kv head the packed queries are for, -1: none */
    float *angles;    /* cos, sin, scratch: 4 * HFA_MAX_HEAD_DIM */
} hfa_block_private;
#endif
