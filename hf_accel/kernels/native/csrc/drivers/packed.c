/* y = x W^T + b for any number of rows of x: one read of W per PASS rows. For packed weights, and dense ones.
 *
 * Few rows are rounded (for dense weights: packed) by the calling thread; of many, every thread takes its share first.
 * Then each chunk of W, 16 or 32 packed rows of it at a time, meets all rows of x while it is in the cache. */
#include "drivers/product.h"

enum { PASS = 256 }; /* rows of x per read of W: their rounded copies stay small, the read costs nothing beside the products */
enum { MANY = 4 * HFA_DOT_ROWS }; /* beside more rows of x, 3 bits are taken apart once and not for every HFA_ROUNDED_ROWS of them */

typedef struct {
    const hfa_kernels *kernels;
    const hfa_matrix *weight;
    const char *x; char *y;
    char *rounded, *loaded; /* loaded: a group of rows of fp32 per thread */
    char *widened; size_t widened_bytes; /* per thread, rows of W that go together; NULL: multiplied as they are */
    int group_rows; size_t group_bytes; /* rows of x come rounded in groups */
    hfa_range *pack_ranges, *ranges;
    hfa_barrier *barrier;
    int64_t chunk_rows;
    int m, threads, many; /* many: of this pass, see hfa_are_many */
} packed_call;

static size_t group_bytes(const packed_call *call, int many) {
    const hfa_matrix *w = call->weight;
    return w->format == HFA_DENSE ? hfa_packed_bytes(call->kernels, HFA_DOT_ROWS, w->inner)
                                  : (size_t)hfa_rounded_rows(call->kernels, w->format, many, call->group_rows, w->inner);
}

static void round_group(const packed_call *call, int64_t group, float *loaded) {
    const hfa_matrix *w = call->weight;
    int64_t first = group * call->group_rows, count = call->m - first < call->group_rows ? call->m - first : call->group_rows;
    void *to = call->rounded + call->group_bytes * (size_t)group;
    if (w->format == HFA_DENSE) {
        call->kernels->pack(call->x + first * w->inner * call->kernels->element, w->inner, (int)count, w->inner, to);
        return;
    }
    call->kernels->load(call->x + first * w->inner * call->kernels->element, loaded, count * w->inner);
    (call->many ? call->kernels->round_many : call->kernels->round_for)(w->format, loaded, w->inner, (int)count, w->inner, to);
}

/* `count` rows of W of 3 bits, up to whole strips, from `row` on in the layout of 4 bits. Codes keep their 4 added: x is rounded for that. */
static hfa_matrix widen(const hfa_matrix *w, int64_t row, int64_t count, uint8_t *restrict to) {
    enum { PART = 4 * HFA_LANES };
    int64_t padded = hfa_padded(w->inner), before = row * ((padded + w->group - 1) / w->group);
    const uint8_t *restrict from = (const uint8_t *)w->weight + row * padded * 3 / 8;
    hfa_matrix wide = *w;
    wide.weight = to;
    wide.format = HFA_INT4;
    wide.scales = (const char *)w->scales + before * hfa_scale_bytes(w->format, w->stride);
    if (w->offsets) wide.offsets = w->offsets + before;
    int64_t end = (count + HFA_LANES - 1) / HFA_LANES * padded;
    for (int64_t b = 0; b < end; b += HFA_QUANTUM, from += 3 * PART, to += 4 * PART) {
        for (int i = 0; i < 3 * PART; i++) to[i] = (uint8_t)((from[i] & 7) | (from[i] & 0x38) << 1);
        for (int i = 0; i < PART; i++) {
            uint8_t first = from[i], second = from[PART + i], lowest = from[2 * PART + i];
            to[3 * PART + i] = (uint8_t)((first >> 5 & 6) | (lowest >> 6 & 1) | (second >> 1 & 0x60) | (lowest >> 3 & 0x10));
        }
    }
    return wide;
}

static void packed_task(void *arg, int thread, int team) {
    packed_call *call = arg;
    const hfa_kernels *kernels = call->kernels;
    const hfa_matrix *w = call->weight;
    const hfa_activations kind = {.many = call->many};
    int in_bands = hfa_goes_in_bands(w, call->m), most = in_bands ? hfa_band(kernels, &kind) : HFA_DOT_ROWS, width = in_bands ? HFA_BAND_ROWS : HFA_TILE;
    float acc[HFA_BAND_MOST * HFA_BAND_ROWS]; /* or HFA_DOT_ROWS * HFA_TILE, which are fewer */
    float *loaded = (float *)call->loaded + (int64_t)thread * call->group_rows * w->inner;
    for (int64_t group; (group = hfa_ranges_take(call->pack_ranges, call->threads, thread)) >= 0;) round_group(call, group, loaded);
    hfa_barrier_wait(call->barrier, team);
    for (int64_t chunk; (chunk = hfa_ranges_take(call->ranges, call->threads, thread)) >= 0;) {
        int64_t row = chunk * call->chunk_rows, end = row + call->chunk_rows < w->rows ? row + call->chunk_rows : w->rows;
        for (int64_t step = hfa_tile_rows(kernels, w, call->m); row < end; row += step) {
            int64_t n = end - row < step ? end - row : step;
            const char *bias = w->bias ? (const char *)w->bias + row * kernels->element : NULL;
            int widens = call->widened && call->m > MANY && !call->many;
            hfa_matrix wide;
            if (widens) wide = widen(w, row, n, (uint8_t *)call->widened + call->widened_bytes * (size_t)thread);
            for (int m0 = 0; m0 < call->m; m0 += most) {
                int m = call->m - m0 < most ? call->m - m0 : most;
                hfa_activations x = {.many = call->many};
                x.packed[widens ? wide.format : w->format] = call->rounded + call->group_bytes * (size_t)(m0 / call->group_rows);
                if (in_bands) hfa_product_band(kernels, widens ? &wide : w, widens ? 0 : row, n, &x, 0, m, acc);
                else hfa_product_tile(kernels, widens ? &wide : w, widens ? 0 : row, n, &x, 0, m, NULL, acc);
                for (int i = 0; i < m; i++)
                    kernels->finish(acc + i * width, bias, n, call->y + ((m0 + i) * w->rows + row) * kernels->element);
            }
        }
    }
}

int hfa_packed_linear(const void *x, const hfa_matrix *w, void *y, int64_t m, int64_t flags) {
    int64_t dtype = flags & 0xff, threads = flags >> 16;
    int is_dense = w->format == HFA_DENSE;
    if (!x || !y || !w->weight || (!is_dense && !w->scales) || m < 1 || w->inner < 1 || w->rows < 1 || (!is_dense && w->group < 1) || (uint64_t)w->format >= HFA_FORMATS || dtype >= HFA_DTYPES)
        return -1;
    if (!is_dense && (w->format == HFA_FP4) != (w->stride == 2)) return -1;
    if (w->format == HFA_FP4 && w->offsets) return -1;
    const hfa_kernels *kernels = hfa_active_kernels((int)dtype);
    int64_t row_bytes = hfa_row_bytes(kernels, w);
    packed_call call = {.kernels = kernels, .weight = w};
    /* many rows are work for a thread long before their bytes are */
    call.threads = hfa_useful_threads(row_bytes * w->rows * (m > HFA_DOT_ROWS ? 8 : 1), threads);
    int64_t passes = (m + PASS - 1) / PASS, most = (m + passes - 1) / passes; /* of a pass: all about as many */
    int are_many = !is_dense && hfa_are_many(kernels, (int)most, 0);
    call.group_rows = is_dense || are_many ? HFA_DOT_ROWS : HFA_ROUNDED_ROWS;
    call.group_bytes = group_bytes(&call, are_many);
    size_t range_bytes = sizeof(hfa_range) * (size_t)call.threads;
    size_t loaded_bytes = ((size_t)(call.group_rows * w->inner * 4 * call.threads) + 63) / 64 * 64;
    size_t rounded_bytes = call.group_bytes * (size_t)((most + call.group_rows - 1) / call.group_rows);
    if (w->format == HFA_INT3 && m > MANY) call.widened_bytes = (size_t)(kernels->packed_together / 2 * hfa_padded(w->inner));
    char *scratch = hfa_scratch(sizeof(hfa_barrier) + 2 * range_bytes + loaded_bytes + rounded_bytes + call.widened_bytes * (size_t)call.threads);
    if (!scratch) return -1;
    call.barrier = (hfa_barrier *)scratch;
    call.pack_ranges = (hfa_range *)(scratch + sizeof(hfa_barrier));
    call.ranges = (hfa_range *)(scratch + sizeof(hfa_barrier) + range_bytes);
    call.loaded = scratch + sizeof(hfa_barrier) + 2 * range_bytes;
    call.rounded = call.loaded + loaded_bytes;
    if (call.widened_bytes) call.widened = call.rounded + rounded_bytes;
    *call.barrier = (hfa_barrier){0};
    call.chunk_rows = hfa_chunk_rows(hfa_rows_together(kernels, w, (int)most), hfa_rows_wanted(kernels, w, (int)most), row_bytes, row_bytes * w->rows, call.threads);
    for (int64_t m0 = 0; m0 < m; m0 += most) {
        call.m = (int)(m - m0 < most ? m - m0 : most);
        call.many = !is_dense && hfa_are_many(kernels, call.m, 0);
        call.group_bytes = group_bytes(&call, call.many);
        call.x = (const char *)x + m0 * w->inner * kernels->element;
        call.y = (char *)y + m0 * w->rows * kernels->element;
        int64_t groups = (call.m + call.group_rows - 1) / call.group_rows;
        if (call.m <= HFA_DOT_ROWS) { /* not worth waiting for one another */
            for (int64_t group = 0; group < groups; group++) round_group(&call, group, (float *)call.loaded);
            groups = 0;
        }
        hfa_ranges_deal(call.pack_ranges, call.threads, groups);
        hfa_ranges_deal(call.ranges, call.threads, (w->rows + call.chunk_rows - 1) / call.chunk_rows);
        hfa_parallel(packed_task, &call, call.threads);
    }
    return 0;
}
