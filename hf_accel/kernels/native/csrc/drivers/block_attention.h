/* The attention of a decoder layer call, as block.c runs it between the products. */
#ifndef HFA_BLOCK_ATTENTION_H
#define HFA_BLOCK_ATTENTION_H
#include "drivers/block_run.h"

/* Of few rows, and of many but for prompts: in the parallel region of the pass. */
int64_t hfa_attention_bytes(const hfa_block_run *run); /* of keys and values that are read */
void hfa_attention_plan(hfa_block_run *run); /* fills run->tasks */
void hfa_attention_run(hfa_block_run *run, hfa_block_private *mine, int self);
void hfa_attention_merge(const hfa_block_run *run, int64_t r, float *out); /* out [H D] of row r, rounded and gated */
/* Of prompts: keys and values of row r go to the cache, its queries to run->query; then, in a region of its own, run->attended. */
void hfa_attention_prepare(const hfa_block_run *run, hfa_block_private *mine, int64_t r);
int hfa_attention_of_prompt(hfa_block_run *run); /* -1 when memory is short */
/* attended [H D] of row r times the sigmoid of its gate, rounded, where there is one */
void hfa_attention_gate(const hfa_block_run *run, float *attended, int64_t r);
/* Whether passes of many rows cannot do what the call's mask asks for. */
int hfa_attention_refuses(const hfa_block_run *run);
#endif
