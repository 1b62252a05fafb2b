/* The attention of a decoder layer call, as block.c runs it between the products. */
#ifndef HFA_BLOCK_ATTENTION_H
#define HFA_BLOCK_ATTENTION_H
#include "drivers/block_run.h"

int64_t hfa_attention_plan(hfa_block_run *run); /* sets pieces, queries and tiles; returns the number of tasks */
/* Whether a pass that ends before the call's last token would hide what the call's mask shows. */
int hfa_attention_looks_ahead(const hfa_block_run *run);
/* Keys and values of row r go to the cache. Where rows are shared, those of all rows do before the attention runs. */
void hfa_attention_write(const hfa_block_run *run, hfa_block_private *mine, int64_t r);
/* out[R][stride], rounded; where rows are not shared only after hfa_attention_merge. */
void hfa_attention_run(hfa_block_run *run, hfa_block_private *mine, int self, float *out, int64_t stride);
void hfa_attention_merge(const hfa_block_run *run, float *out, int64_t stride);
#endif
