/* See product.h. Chunks lie in address order and each thread takes a run of them: one sequential stream per thread. */
#include "product.h"

int64_t hfa_chunk_rows(const hfa_kernels *kernels, int64_t row_bytes, int64_t total_bytes, int threads) {
    int64_t target = total_bytes / (threads * 8); /* at least eight turns each, to even out the ends */
    if (target < 8 << 10) target = 8 << 10;
    if (target > 128 << 10) target = 128 << 10;
    int64_t step = kernels->rows_together, rows = (target / row_bytes + step - 1) / step * step;
    return rows < step ? step : rows;
}

int hfa_useful_threads(int64_t bytes, int64_t threads) {
    int64_t most = bytes / (32 << 10); /* waking a thread costs about what reading 32 KB does */
    if (threads > HFA_MAX_THREADS) threads = HFA_MAX_THREADS;
    if (threads > most) threads = most;
    return threads < 1 ? 1 : (int)threads;
}

int64_t hfa_products_plan(hfa_products *p, int threads) {
    int64_t total = 0;
    for (int i = 0; i < p->count; i++) total += p->item[i].matrix->rows * p->item[i].matrix->inner * p->kernels->element;
    p->first_chunk[0] = 0;
    for (int i = 0; i < p->count; i++) {
        const hfa_matrix *w = p->item[i].matrix;
        p->chunk_rows[i] = hfa_chunk_rows(p->kernels, w->inner * p->kernels->element, total, threads);
        p->first_chunk[i + 1] = p->first_chunk[i] + (w->rows + p->chunk_rows[i] - 1) / p->chunk_rows[i];
    }
    return p->first_chunk[p->count];
}

void hfa_products_run(const hfa_products *p, const void *packed, hfa_range *ranges, int threads, int self) {
    const hfa_kernels *kernels = p->kernels;
    float acc[HFA_MAX_ROWS * HFA_TILE];
    for (int64_t chunk; (chunk = hfa_ranges_take(ranges, threads, self)) >= 0;) {
        int i = 0;
        while (chunk >= p->first_chunk[i + 1]) i++;
        const hfa_product *item = &p->item[i];
        const hfa_matrix *w = item->matrix;
        int64_t row = (chunk - p->first_chunk[i]) * p->chunk_rows[i], end = row + p->chunk_rows[i];
        if (end > w->rows) end = w->rows;
        for (; row < end; row += HFA_TILE) {
            int64_t n = end - row < HFA_TILE ? end - row : HFA_TILE;
            const char *bias = w->bias ? (const char *)w->bias + row * kernels->element : NULL;
            kernels->dot((const char *)w->weight + row * w->stride * kernels->element, w->stride, n, w->inner, packed, p->m,
                         acc, HFA_TILE);
            for (int m = 0; m < p->m; m++) {
                int64_t at = m * item->ldo + row;
                if (p->keeps_f32) kernels->finish_f32(acc + m * HFA_TILE, bias, n, (float *)item->out + at);
                else kernels->finish(acc + m * HFA_TILE, bias, n, (char *)item->out + at * kernels->element);
            }
        }
    }
}
