/* Products of several weights with one packed activation, cut into chunks of rows for the threads. A dense weight may lie transposed,
 * see hfa_matrix. */
#ifndef HFA_PRODUCT_H
#define HFA_PRODUCT_H
#include "kernels.h"
#include "threads.h"

#define HFA_TILE 64 /* rows of W whose results wait in fp32 before bias and rounding */

#define HFA_TOGETHER 128 /* rows of x, whole blocks of lanes, that meet rows of W while these are in L1 */
#define HFA_ROOM (HFA_TILE * HFA_TOGETHER)

#define HFA_TRANSPOSED HFA_FORMATS /* the kind of a dense weight that lies transposed; of others it is their format */

/* The rows of x as each kind of weight wants them; NULL where no weight of that kind takes part. lanes: for dense weights blocks of
 * HFA_MAX_ROWS rows lie [words][HFA_MAX_ROWS], a row in a lane, as in the attention of prompts. many: for packed weights rows lie as
 * `dot_many` wants them. */
typedef struct { void *packed[HFA_FORMATS + 1]; int lanes, rows, many; } hfa_activations;

/* out: rows of the dtype, or of fp32 holding rounded values when keeps_f32; ldo in elements of it. activates: with keeps_f32, what is
 * rounded goes through `activation`. in_order: each sum is added up as for few rows, to the last bit, however many there are. */
typedef struct { const hfa_matrix *matrix; void *out; int64_t ldo; } hfa_product;
typedef struct {
    const hfa_kernels *kernels;
    int count, m, keeps_f32, activates, activation, in_order;
    hfa_product item[HFA_MAX_GROUP];
    int64_t chunk_rows[HFA_MAX_GROUP], first_chunk[HFA_MAX_GROUP + 1];
} hfa_products;

/* Bytes of a row of W, scales included; rows of W that are computed together beside m rows of x. */
int64_t hfa_row_bytes(const hfa_kernels *kernels, const hfa_matrix *w);
int64_t hfa_rows_together(const hfa_kernels *kernels, const hfa_matrix *w, int m);
/* Bytes of the activations for m rows of x and all weights; lays them out in `memory` when it is not NULL. */
size_t hfa_activations_lay_out(const hfa_products *products, int64_t k, char *memory, hfa_activations *x);
/* Packs fp32 rows m0..m0+m that hold values of the dtype; m0 is a multiple of HFA_DOT_ROWS, and so is m but at the end. */
void hfa_activations_pack(const hfa_products *products, const float *rows, int64_t stride, int64_t k, int m0, int m, const hfa_activations *x);
/* acc[m * HFA_TILE + n] for n < rows <= HFA_TILE rows of W from `row` on and the rows of x from m0 on, m <= HFA_MAX_ROWS. room: NULL,
 * or HFA_ROOM numbers of the thread's own, kept from m0 = 0 to the last rows of x: the first call of a tile computes there for many. */
void hfa_product_tile(const hfa_kernels *kernels, const hfa_matrix *w, int64_t row, int64_t rows, const hfa_activations *x, int m0, int m,
                      float *room, float *acc);
/* Beside many rows of x packed weights take hfa_band of them in a call: acc[m * HFA_BAND_ROWS + n] for n < rows <= HFA_BAND_ROWS. */
int hfa_band(const hfa_kernels *kernels, const hfa_activations *x);
int hfa_goes_in_bands(const hfa_matrix *w, int m);
/* Whether packed weights beside m rows of x have a way of their own; in_order: to the last bit as few rows have. */
int hfa_are_many(const hfa_kernels *kernels, int m, int in_order);
void hfa_product_band(const hfa_kernels *kernels, const hfa_matrix *w, int64_t row, int64_t rows, const hfa_activations *x, int m0, int m, float *acc);
/* Rows of W that meet all m rows of x before the next ones. */
int64_t hfa_tile_rows(const hfa_kernels *kernels, const hfa_matrix *w, int m);

/* Chooses the chunks; returns their number. */
int64_t hfa_products_plan(hfa_products *products, int threads);
void hfa_products_run(const hfa_products *products, const hfa_activations *x, hfa_range *ranges, int threads, int self);
/* Rows of W that are worth having in one chunk if there are enough of them. */
int64_t hfa_rows_wanted(const hfa_kernels *kernels, const hfa_matrix *w, int m);
/* Rows of a chunk, a multiple of `together`, of `row_bytes` each when `total_bytes` are read by `threads` in this phase. */
int64_t hfa_chunk_rows(int64_t together, int64_t wanted, int64_t row_bytes, int64_t total_bytes, int threads);
/* Threads worth waking for so many bytes of weights. */
int hfa_useful_threads(int64_t bytes, int64_t threads);
#endif
