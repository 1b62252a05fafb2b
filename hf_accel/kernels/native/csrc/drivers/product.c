/* See product.h. Chunks lie in address order and each thread takes a run of them: one sequential stream per thread. */
#include <string.h>
#include "drivers/product.h"

enum { ROOM = 8192 };  /* results of transposed weights that wait in fp32: columns times rows of x */
enum { DEPTH = 512 };  /* rows of such a weight summed apart before they join the total: long sums keep their accuracy */
enum { WIDEST = 1024 }; /* columns of it are one or two pages of a row: wide enough to stream, narrow enough to share out */

static int64_t kind_of(const hfa_matrix *w) { return w->format == HFA_DENSE && w->group ? HFA_TRANSPOSED : w->format; }

int64_t hfa_row_bytes(const hfa_kernels *kernels, const hfa_matrix *w) {
    int64_t padded = hfa_padded(w->inner), scale = hfa_scale_bytes(w->format, w->stride);
    if (w->format == HFA_DENSE) return w->inner * kernels->element;
    return padded * hfa_code_bits(w->format) / 8 + (padded + w->group - 1) / w->group * (scale + (w->offsets ? 4 : 0));
}

int64_t hfa_rows_together(const hfa_kernels *kernels, const hfa_matrix *w, int m) {
    return w->format == HFA_DENSE ? kernels->rows_together : m > 1 ? kernels->packed_together : HFA_LANES;
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
    int fits = p->m > HFA_MAX_ROWS && p->kernels->lanes && !p->in_order;
    for (int i = 0; fits && i < p->count && p->kernels->prompt->pairs; i++)
        fits = k % HFA_STRIP == 0 && (p->item[i].matrix->stride % 2 == 0 || kind_of(p->item[i].matrix) == HFA_TRANSPOSED);
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
static void dot_lanes(const hfa_kernels *kernels, const hfa_matrix *w, int64_t row, int64_t rows, const hfa_activations *a, int m0, int m,
                      float *room, float *acc) {
    float one[HFA_TILE * HFA_MAX_ROWS], *sums = one;
    const char *from = (const char *)w->weight + row * w->stride * kernels->element;
    const void *x = (const char *)a->packed[HFA_DENSE] + hfa_packed_bytes(kernels, m0, w->inner);
    int64_t each = kernels->prompt->pairs ? 2 : 1, stride = w->stride / each, words = w->inner / each;
    int before = m0 % HFA_TOGETHER, many = a->rows - m0 < HFA_TOGETHER ? a->rows - m0 : HFA_TOGETHER;
    if (room && kernels->lanes_blocks) {
        sums = room + before * rows;
        int64_t block = (int64_t)hfa_packed_bytes(kernels, HFA_MAX_ROWS, w->inner) / 4;
        if (!before) kernels->lanes_blocks(from, stride, rows, words, x, block, many, room);
    } else {
        kernels->lanes(from, stride, rows, words, x, m, !m0, sums);
    }
    kernels->prompt->transpose(sums, HFA_MAX_ROWS, rows, m, acc, HFA_TILE);
}

size_t hfa_activations_lay_out(const hfa_products *p, int64_t k, char *memory, hfa_activations *x) {
    size_t used = 0;
    x->lanes = takes_lanes(p, k);
    x->rows = p->m;
    x->many = hfa_are_many(p->kernels, p->m, p->in_order);
    for (int f = 0; f <= HFA_TRANSPOSED; f++) x->packed[f] = NULL;
    for (int i = 0; i < p->count; i++) {
        int64_t kind = kind_of(p->item[i].matrix);
        if (x->packed[kind]) continue;
        x->packed[kind] = memory ? memory + used : (char *)64; /* only counting: any address marks it as seen */
        int rows = x->lanes ? (p->m + HFA_MAX_ROWS - 1) / HFA_MAX_ROWS * HFA_MAX_ROWS : p->m;
        used += kind == HFA_DENSE ? hfa_packed_bytes(p->kernels, rows, k)
            : kind == HFA_TRANSPOSED ? (sizeof(float) * (size_t)(p->m * k) + 63) / 64 * 64 : (size_t)(hfa_rounded_rows(p->kernels, kind, x->many, p->m, k) + 63) / 64 * 64;
    }
    return used;
}

/* Where rows m0.. of x begin. */
static char *rows_from(const hfa_kernels *kernels, const hfa_activations *x, int64_t format, int64_t k, int m0) {
    return (char *)x->packed[format] + (format == HFA_DENSE ? (int64_t)hfa_packed_bytes(kernels, m0, k) : hfa_rounded_rows(kernels, format, x->many, m0, k));
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
        if (x->packed[format])
            (x->many ? p->kernels->round_many : p->kernels->round_for)(format, rows, stride, m, k, rows_from(p->kernels, x, format, k, m0));
    for (int r = 0; x->packed[HFA_TRANSPOSED] && r < m; r++)
        memcpy((float *)x->packed[HFA_TRANSPOSED] + (m0 + r) * k, rows + r * stride, sizeof(float) * (size_t)k);
}

/* out[m * width + n] for n < count columns of a transposed weight from `column` on, at most ROOM in all */
static void multiply_transposed(const hfa_kernels *kernels, const hfa_matrix *w, int64_t column, int64_t count, const hfa_activations *x,
                                int m0, int m, float *out, int64_t width) {
    float sums[ROOM];
    const float *rows = (const float *)x->packed[HFA_TRANSPOSED] + m0 * w->inner;
    for (int64_t k = 0; k < w->inner; k += DEPTH) {
        int64_t depth = w->inner - k < DEPTH ? w->inner - k : DEPTH;
        float *to = k ? sums : out;
        for (int i = 0; i < m; i++) memset(to + i * width, 0, sizeof(float) * (size_t)count);
        kernels->axpy((const char *)w->weight + (k * w->stride + column) * kernels->element, w->stride, depth, count, rows + k, w->inner, m,
                      to, width);
        for (int i = 0; k && i < m; i++)
            for (int64_t n = 0; n < count; n++) out[i * width + n] += sums[i * width + n];
    }
}

static void dot_rounded(const hfa_kernels *kernels, const hfa_matrix *w, int64_t row, int64_t rows, const hfa_activations *x, int m0, int m,
                        float *acc, int64_t ldo) {
    const void *rounded = rows_from(kernels, x, w->format, w->inner, m0);
    (x->many ? kernels->dot_many : kernels->dot_packed)[w->format](w, row, rows, rounded, m, acc, ldo);
}

void hfa_product_tile(const hfa_kernels *kernels, const hfa_matrix *w, int64_t row, int64_t rows, const hfa_activations *x, int m0, int m,
                      float *room, float *acc) {
    if (kind_of(w) == HFA_TRANSPOSED)
        multiply_transposed(kernels, w, row, rows, x, m0, m, acc, HFA_TILE);
    else if (w->format != HFA_DENSE)
        dot_rounded(kernels, w, row, rows, x, m0, m, acc, HFA_TILE);
    else if (x->lanes)
        dot_lanes(kernels, w, row, rows, x, m0, m, room, acc);
    else
        for (int i = 0; i < m; i += HFA_DOT_ROWS) /* from the second on, W comes from the cache */
            kernels->dot((const char *)w->weight + row * w->stride * kernels->element, w->stride, rows, w->inner,
                         rows_from(kernels, x, HFA_DENSE, w->inner, m0 + i), m - i < HFA_DOT_ROWS ? m - i : HFA_DOT_ROWS,
                         acc + i * HFA_TILE, HFA_TILE);
}

int hfa_are_many(const hfa_kernels *kernels, int m, int in_order) {
    return m >= HFA_MANY_ROWS && kernels->round_many && !(in_order && kernels->many_pairs);
}

int hfa_band(const hfa_kernels *kernels, const hfa_activations *x) { return x->many && kernels->many_pairs ? HFA_BAND_MOST : HFA_BAND; }

int hfa_goes_in_bands(const hfa_matrix *w, int m) { return m > HFA_DOT_ROWS && w->format != HFA_DENSE; }

void hfa_product_band(const hfa_kernels *kernels, const hfa_matrix *w, int64_t row, int64_t rows, const hfa_activations *x, int m0, int m, float *acc) {
    dot_rounded(kernels, w, row, rows, x, m0, m, acc, HFA_BAND_ROWS);
}

/* Few rows of x: many of W per call; many: 16 or 32 packed ones, which stay in the cache while x passes. */
int64_t hfa_tile_rows(const hfa_kernels *kernels, const hfa_matrix *w, int m) {
    return hfa_goes_in_bands(w, m) ? kernels->packed_together : HFA_TILE;
}

static int64_t columns_of_chunk(int64_t columns, int threads) {
    int64_t most = (columns / (threads * 2) + HFA_TILE - 1) / HFA_TILE * HFA_TILE;
    return most > WIDEST ? WIDEST : most < HFA_TILE ? HFA_TILE : most;
}

int64_t hfa_products_plan(hfa_products *p, int threads) {
    int64_t total = 0;
    for (int i = 0; i < p->count; i++) total += p->item[i].matrix->rows * hfa_row_bytes(p->kernels, p->item[i].matrix);
    p->first_chunk[0] = 0;
    for (int i = 0; i < p->count; i++) {
        const hfa_matrix *w = p->item[i].matrix;
        p->chunk_rows[i] = hfa_chunk_rows(hfa_rows_together(p->kernels, w, p->m), hfa_rows_wanted(p->kernels, w, p->m),
                                          hfa_row_bytes(p->kernels, w), total, threads);
        if (kind_of(w) == HFA_TRANSPOSED) p->chunk_rows[i] = columns_of_chunk(w->rows, threads);
        p->first_chunk[i + 1] = p->first_chunk[i] + (w->rows + p->chunk_rows[i] - 1) / p->chunk_rows[i];
    }
    return p->first_chunk[p->count];
}

/* m rows of n results, `width` apart and with room up to whole vectors, go to rows m0.. of the item's output */
static void finish(const hfa_products *p, const hfa_product *item, int64_t row, int64_t n, int m0, int m, float *acc, int64_t width) {
    const hfa_kernels *kernels = p->kernels;
    const char *bias = item->matrix->bias ? (const char *)item->matrix->bias + row * kernels->element : NULL;
    for (int i = 0; i < m; i++, acc += width) {
        int64_t at = (m0 + i) * item->ldo + row, whole = (n + 15) / 16 * 16;
        if (!p->keeps_f32) {
            kernels->finish(acc, bias, n, (char *)item->out + at * kernels->element);
        } else if (!p->activates) {
            kernels->finish_f32(acc, bias, n, (float *)item->out + at);
        } else {
            kernels->finish_f32(acc, bias, n, acc);
            for (int64_t j = n; j < whole; j++) acc[j] = 0.0f; /* whole vectors: no tail with other rounding */
            kernels->gate(p->activation, acc, NULL, whole, acc);
            memcpy((float *)item->out + at, acc, sizeof(float) * (size_t)n);
        }
    }
}

/* Rows [row, end) of W, which are columns as it lies. */
static void run_transposed(const hfa_products *p, const hfa_product *item, int64_t row, int64_t end, const hfa_activations *x) {
    float acc[ROOM];
    for (int m0 = 0; m0 < p->m; m0 += HFA_MAX_ROWS) {
        int m = p->m - m0 < HFA_MAX_ROWS ? p->m - m0 : HFA_MAX_ROWS;
        int64_t most = ROOM / m / HFA_TILE * HFA_TILE, width = most < WIDEST ? most : WIDEST;
        for (int64_t column = row; column < end; column += width) {
            int64_t n = end - column < width ? end - column : width;
            multiply_transposed(p->kernels, item->matrix, column, n, x, m0, m, acc, width);
            finish(p, item, column, n, m0, m, acc, width);
        }
    }
}

void hfa_products_run(const hfa_products *p, const hfa_activations *x, hfa_range *ranges, int threads, int self) {
    float acc[HFA_BAND_MOST * HFA_BAND_ROWS], room[HFA_ROOM]; /* acc: or HFA_MAX_ROWS * HFA_TILE, which are fewer */
    for (int64_t chunk; (chunk = hfa_ranges_take(ranges, threads, self)) >= 0;) {
        int i = 0;
        while (chunk >= p->first_chunk[i + 1]) i++;
        const hfa_product *item = &p->item[i];
        const hfa_matrix *w = item->matrix;
        int64_t row = (chunk - p->first_chunk[i]) * p->chunk_rows[i], end = row + p->chunk_rows[i];
        if (end > w->rows) end = w->rows;
        if (kind_of(w) == HFA_TRANSPOSED) {
            run_transposed(p, item, row, end, x);
            continue;
        }
        for (int64_t step = hfa_tile_rows(p->kernels, w, p->m); row < end; row += step) {
            int64_t n = end - row < step ? end - row : step;
            int in_bands = hfa_goes_in_bands(w, p->m), most = in_bands ? hfa_band(p->kernels, x) : HFA_MAX_ROWS;
            for (int m0 = 0; m0 < p->m; m0 += most) {
                int m = p->m - m0 < most ? p->m - m0 : most;
                if (in_bands) hfa_product_band(p->kernels, w, row, n, x, m0, m, acc);
                else hfa_product_tile(p->kernels, w, row, n, x, m0, m, room, acc);
                finish(p, item, row, n, m0, m, acc, in_bands ? HFA_BAND_ROWS : HFA_TILE);
            }
        }
    }
}
