/* The attention of a decoder layer call, as block.c runs it between the products. */
#ifndef HFA_BLOCK_ATTENTION_H
#define HFA_BLOCK_ATTENTION_H
#include "drivers/block_run.h"

void hfa_attention_plan(hfa_block_run *run); /* sets first_piece and pieces */
void hfa_attention_run(hfa_block_run *run, hfa_block_private *mine, int self);
void hfa_attention_merge(const hfa_block_run *run, float *out, int64_t stride); /* out[R][stride], rounded */
#endif
