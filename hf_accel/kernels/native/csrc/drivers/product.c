/* See product.h. Chunks lie in address order and each thread takes a run of them: one sequential stream per thread. */
#include "drivers/product.h"

int64_t hfa_row_bytes(const hfa_kernels *kernels, const hfa_matrix *w) {
    int64_t padded = hfa_padded(w->inner), scale = hfa_scale_bytes(w->format, w->stride);
    if (w->format == HFA_DENSE) return w->inner * kernels->element;
    return padded * hfa_code_bits(w->format) / 8 + (padded + w->group - 1) / w->group * (scale + (w->offsets ? 4 : 0));
}

int64_t hfa_rows_together(const hfa_kernels *kernels, const hfa_matrix *w) {
    return w->format == HFA_DENSE ? kernels->rows_together : HFA_LANES;
}

int64_t hfa_rows_wanted(const hfa_kernels *kernels, const hfa_matrix *w, int m) {
    return w->format == HFA_DENSE && m >= kernels->panels_from ? HFA_PANEL_ROWS : 1;
}

int64_t hfa_chunk_rows(int64_t together, int64_t wanted, int64_t row_bytes, int64_t total_bytes, int threads) {
    int64_t most = wanted * row_bytes > 128 << 10 ? wanted * row_bytes : 128 << 10;
    int64_t target = total_bytes / (threads * 8); /* at least eight turns each, to even out the ends */
    if (target < 8 << 10) target = 8 << 10;
    if (target > most) target = most;
    int64_t rows = (target / row_bytes + together - 1) / together * together;
    return rows < together ? together : rows;
}

int hfa_useful_threads(int64_t bytes, int64_t threads) {
    int64_t most = bytes / (32 << 10); /* waking a thread costs about what reading 32 KB does */
    if (threads > HFA_MAX_THREADS) threads = HFA_MAX_THREADS;
    if (threads > most) threads = most;
    return threads < 1 ? 1 : (int)threads;
}

/* Words of 32 columns, where they are pairs. */
static int takes_lanes(const hfa_products *p, int64_t k) {
    int fits = p->m > HFA_MAX_ROWS && p->kernels->lanes;
    for (int i = 0; fits && i < p->count && p->kernels->prompt->pairs; i++) fits = k % HFA_STRIP == 0 && p->item[i].matrix->stride % 2 == 0;
    return fits;
}

static void pack_lanes(const hfa_kernels *kernels, const float *rows, int64_t stride, int64_t k, int m, char *to) {
    const hfa_prompt_kernels *inner = kernels->prompt;
    uint16_t pairs[HFA_DOT_ROWS * 2 * HFA_SECTION];
    if (!inner->pairs) {
        inner->transpose(rows, stride, m, k, to, HFA_MAX_ROWS);
        return;
    }
    for (int64_t i = 0; i < k; i += 2 * HFA_SECTION, to += HFA_SECTION * HFA_MAX_ROWS * 4) {
        int64_t columns = k - i < 2 * HFA_SECTION ? k - i : 2 * HFA_SECTION;
        for (int r = 0; r < m; r++) kernels->store(rows + r * stride + i, pairs + r * 2 * HFA_SECTION, columns);
        inner->transpose(pairs, HFA_SECTION, m, columns / 2, to, HFA_MAX_ROWS);
    }
}

/* acc[m * HFA_TILE + n] as hfa_product_tile */
static void dot_lanes(const hfa_kernels *kernels, const hfa_matrix *w, int64_t row, int64_t rows, const void *x, int m, int is_first, float *acc) {
    float sums[HFA_TILE * HFA_MAX_ROWS];
    int64_t each = kernels->prompt->pairs ? 2 : 1;
    kernels->lanes((const char *)w->weight + row * w->stride * kernels->element, w->stride / each, rows, w->inner / each, x, m,
                   is_first, sums);
    kernels->prompt->transpose(sums, HFA_MAX_ROWS, rows, m, acc, HFA_TILE);
}

size_t hfa_activations_lay_out(const hfa_products *p, int64_t k, char *memory, hfa_activations *x) {
    size_t used = 0;
    x->lanes = takes_lanes(p, k);
    for (int f = 0; f < HFA_FORMATS; f++) x->packed[f] = NULL;
    for (int i = 0; i < p->count; i++) {
        int64_t format = p->item[i].matrix->format;
        if (x->packed[format]) continue;
        x->packed[format] = memory ? memory + used : (char *)64; /* only counting: any address marks it as seen */
        int rows = x->lanes ? (p->m + HFA_MAX_ROWS - 1) / HFA_MAX_ROWS * HFA_MAX_ROWS : p->m;
        used += format == HFA_DENSE ? hfa_packed_bytes(p->kernels, rows, k) : hfa_rounded_bytes(format, p->m, k);
    }
    return used;
}

/* Where rows m0.. of x begin. */
static char *rows_from(const hfa_kernels *kernels, const hfa_activations *x, int64_t format, int64_t k, int m0) {
    int64_t padded = hfa_padded(k);
    if (format == HFA_DENSE) return (char *)x->packed[format] + hfa_packed_bytes(kernels, m0, k);
    return (char *)x->packed[format] + m0 * padded * (format == HFA_INT8 ? 2 : 1) + m0 * padded / HFA_QUANTUM * 12;
}

void hfa_activations_pack(const hfa_products *p, const float *rows, int64_t stride, int64_t k, int m0, int m, const hfa_activations *x) {
    if (x->packed[HFA_DENSE] && x->lanes) {
        int lane = m0 % HFA_MAX_ROWS;
        pack_lanes(p->kernels, rows, stride, k, m, rows_from(p->kernels, x, HFA_DENSE, k, m0 - lane) + lane * 4);
    }
    for (int i = 0; x->packed[HFA_DENSE] && !x->lanes && i < m; i += HFA_DOT_ROWS)
        p->kernels->pack_f32(rows + i * stride, stride, m - i < HFA_DOT_ROWS ? m - i : HFA_DOT_ROWS, k,
                             rows_from(p->kernels, x, HFA_DENSE, k, m0 + i));
    for (int64_t format = HFA_DENSE + 1; format < HFA_FORMATS; format++)
        if (x->packed[format]) p->kernels->round_for(format, rows, stride, m, k, rows_from(p->kernels, x, format, k, m0));
}

void hfa_product_tile(const hfa_kernels *kernels, const hfa_matrix *w, int64_t row, int64_t rows, const hfa_activations *x, int m0, int m, float *acc) {
    if (w->format != HFA_DENSE)
        kernels->dot_packed[w->format](w, row, rows, rows_from(kernels, x, w->format, w->inner, m0), m, acc, HFA_TILE);
    else if (x->lanes)
        dot_lanes(kernels, w, row, rows, rows_from(kernels, x, HFA_DENSE, w->inner, m0), m, !m0, acc);
    else
        for (int i = 0; i < m; i += HFA_DOT_ROWS) /* from the second on, W comes from the cache */
            kernels->dot((const char *)w->weight + row * w->stride * kernels->element, w->stride, rows, w->inner,
                         rows_from(kernels, x, HFA_DENSE, w->inner, m0 + i), m - i < HFA_DOT_ROWS ? m - i : HFA_DOT_ROWS,
                         acc + i * HFA_TILE, HFA_TILE);
}

/* Few rows of x: many of W per call; many: 16 packed ones, which stay in L1 while x passes. */
int64_t hfa_tile_rows(const hfa_matrix *w, int m) { return m > HFA_DOT_ROWS && w->format != HFA_DENSE ? HFA_LANES : HFA_TILE; }

int64_t hfa_products_plan(hfa_products *p, int threads) {
    int64_t total = 0;
    for (int i = 0; i < p->count; i++) total += p->item[i].matrix->rows * hfa_row_bytes(p->kernels, p->item[i].matrix);
    p->first_chunk[0] = 0;
    for (int i = 0; i < p->count; i++) {
        const hfa_matrix *w = p->item[i].matrix;
        p->chunk_rows[i] = hfa_chunk_rows(hfa_rows_together(p->kernels, w), hfa_rows_wanted(p->kernels, w, p->m),
                                          hfa_row_bytes(p->kernels, w), total, threads);
        p->first_chunk[i + 1] = p->first_chunk[i] + (w->rows + p->chunk_rows[i] - 1) / p->chunk_rows[i];
    }
    return p->first_chunk[p->count];
}

void hfa_products_run(const hfa_products *p, const hfa_activations *x, hfa_range *ranges, int threads, int self) {
    const hfa_kernels *kernels = p->kernels;
    float acc[HFA_MAX_ROWS * HFA_TILE];
    for (int64_t chunk; (chunk = hfa_ranges_take(ranges, threads, self)) >= 0;) {
        int i = 0;
        while (chunk >= p->first_chunk[i + 1]) i++;
        const hfa_product *item = &p->item[i];
        const hfa_matrix *w = item->matrix;
        int64_t row = (chunk - p->first_chunk[i]) * p->chunk_rows[i], end = row + p->chunk_rows[i];
        if (end > w->rows) end = w->rows;
        for (int64_t step = hfa_tile_rows(w, p->m); row < end; row += step) {
            int64_t n = end - row < step ? end - row : step;
            const char *bias = w->bias ? (const char *)w->bias + row * kernels->element : NULL;
            for (int m0 = 0; m0 < p->m; m0 += HFA_MAX_ROWS) {
                int m = p->m - m0 < HFA_MAX_ROWS ? p->m - m0 : HFA_MAX_ROWS;
                hfa_product_tile(kernels, w, row, n, x, m0, m, acc);
                for (int i = 0; i < m; i++) {
                    int64_t at = (m0 + i) * item->ldo + row;
                    if (p->keeps_f32) kernels->finish_f32(acc + i * HFA_TILE, bias, n, (float *)item->out + at);
                    else kernels->finish(acc + i * HFA_TILE, bias, n, (char *)item->out + at * kernels->element);
                }
            }
        }
    }
}
