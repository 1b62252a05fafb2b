/* Products of several weights with one packed activation, cut into chunks of rows for the threads. */
#ifndef HFA_PRODUCT_H
#define HFA_PRODUCT_H
#include "kernels.h"
#include "threads.h"

#define HFA_TILE 64 /* rows of W whose results wait in fp32 before bias and rounding */

/* out: rows of the dtype, or of fp32 holding rounded values when keeps_f32; ldo in elements of it. */
typedef struct { const hfa_matrix *matrix; void *out; int64_t ldo; } hfa_product;
typedef struct {
    const hfa_kernels *kernels;
    int count, m, keeps_f32;
    hfa_product item[HFA_MAX_GROUP];
    int64_t chunk_rows[HFA_MAX_GROUP], first_chunk[HFA_MAX_GROUP + 1];
} hfa_products;

/* Chooses the chunks; returns their number. */
int64_t hfa_products_plan(hfa_products *products, int threads);
void hfa_products_run(const hfa_products *products, const void *packed, hfa_range *ranges, int threads, int self);
/* Rows of a chunk for a weight with `row_bytes` per row when `total_bytes` are read by `threads` in this phase. */
int64_t hfa_chunk_rows(const hfa_kernels *kernels, int64_t row_bytes, int64_t total_bytes, int threads);
/* Threads worth waking for so many bytes of weights. */
int hfa_useful_threads(int64_t bytes, int64_t threads);
#endif
