/* The experts of a layer for any number of tokens: routed rows are sorted by expert, and each expert's weights meet all of its
 * rows while they are in the cache. Bytes read: those of the distinct experts, once per block of tokens.
 *
 * Phases, separated by barriers: x packed (where there is more than one token), gate and up, the gate with its result packed,
 * down with the weighted sum. Threads share out rows of weights, not experts: how the tokens are spread does not matter. */
#include <math.h>
#include <string.h>
#include "drivers/product.h"

enum { BLOCK_BYTES = 32 << 20 }; /* of gate and up for a block of tokens */
enum { WIDE = 256 };             /* columns of a transposed weight that a thread walks down together */
enum { DEPTH = 512 };            /* rows of it summed apart before they join the total */

/* An expert that has rows: rows first .. first + count - 1 of those sorted by expert. */
typedef struct {
    const hfa_matrix *gate_up, *down;
    int64_t first, count;
    size_t x, inner;                 /* where its packed rows begin */
    int64_t chunk_rows, first_chunk; /* of gate_up */
    int64_t first_group;             /* of HFA_DOT_ROWS rows, over all hits */
} hit;

typedef struct {
    const hfa_experts *layer;
    const hfa_experts_call *call;
    const hfa_kernels *kernels;
    hit *hits; int64_t hit_count;
    int64_t *sources;                /* of a sorted row: token * choices + choice, counted from the block's first */
    int64_t token, tokens;           /* of the block */
    hfa_activations single;          /* the packed row where there is one token; else each hit has its own */
    char *x, *inner;
    float *mid; int64_t mid_width;   /* [rows, 2 I]: gate and up, rounded */
    char *private_memory; size_t private_bytes;
    hfa_barrier *barrier;
    hfa_range *ranges[4];
    int64_t down_rows;               /* of a chunk */
    int64_t width;                   /* room for columns of a product */
    int threads;
} experts_run;

/* Of a thread: rows [16, max(E, I)] before they are packed; gate, up, spare, gated [I]; sums, out [16, width]; y [tokens, width] */
typedef struct { float *rows, *gate, *up, *spare, *gated, *sums, *out, *y; } private_room;

static int64_t whole(int64_t n) { return (n + 15) / 16 * 16; }

static size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Bytes of m rows as `w` wants them. */
static size_t rows_bytes(const experts_run *run, const hfa_matrix *w, int64_t m) {
    if (run->layer->transposed) return aligned((size_t)(m * w->inner) * sizeof(float));
    if (w->format != HFA_DENSE) return aligned((size_t)hfa_rounded_rows(run->kernels, w->format, 0, m, w->inner));
    return (size_t)(m / HFA_DOT_ROWS) * hfa_packed_bytes(run->kernels, HFA_DOT_ROWS, w->inner)
        + hfa_packed_bytes(run->kernels, (int)(m % HFA_DOT_ROWS), w->inner);
}

/* Where rows m0.. begin, m0 a multiple of HFA_DOT_ROWS: groups of rows lie one after the other without gaps. */
static size_t group_offset(const experts_run *run, const hfa_matrix *w, int64_t m0) {
    if (w->format == HFA_DENSE) return rows_bytes(run, w, m0);
    return (size_t)hfa_rounded_rows(run->kernels, w->format, 0, m0, w->inner);
}

static void pack_rows(const experts_run *run, const hfa_matrix *w, const float *rows, int64_t stride, int m, char *to) {
    if (run->layer->transposed)
        for (int i = 0; i < m; i++) memcpy(to + (size_t)(i * w->inner) * sizeof(float), rows + i * stride, (size_t)w->inner * sizeof(float));
    else if (w->format == HFA_DENSE) run->kernels->pack_f32(rows, stride, m, w->inner, to);
    else run->kernels->round_for(w->format, rows, stride, m, w->inner, to);
}

/* out[i * width + n] for rows row..row + n of W (transposed: columns) and m packed rows of x */
static void multiply(const experts_run *run, const hfa_matrix *w, int64_t row, int64_t n, const char *x, int m, float *sums, float *out) {
    const hfa_kernels *kernels = run->kernels;
    if (run->layer->transposed) {
        for (int i = 0; i < m; i++) memset(out + i * run->width, 0, (size_t)n * sizeof(float));
        for (int64_t k = 0; k < w->inner; k += DEPTH) {
            int64_t depth = w->inner - k < DEPTH ? w->inner - k : DEPTH;
            for (int i = 0; i < m; i++) memset(sums + i * run->width, 0, (size_t)n * sizeof(float));
            kernels->axpy((const char *)w->weight + (k * w->stride + row) * kernels->element, w->stride, depth, n, (const float *)x + k,
                          w->inner, m, sums, run->width);
            for (int i = 0; i < m; i++)
                for (int64_t j = 0; j < n; j++) out[i * run->width + j] += sums[i * run->width + j];
        }
    } else if (w->format == HFA_DENSE) {
        kernels->dot((const char *)w->weight + row * w->stride * kernels->element, w->stride, n, w->inner, x, m, out, run->width);
    } else {
        kernels->dot_packed[w->format](w, row, n, x, m, out, run->width);
    }
}

static const char *bias_at(const experts_run *run, const hfa_matrix *w, int64_t row) {
    return w->bias ? (const char *)w->bias + row * run->kernels->element : NULL;
}

/* Rows of W that are multiplied together: for many rows of x packed weights go 16 or 32 at a time, which stay in the cache meanwhile. */
static int64_t tile_rows(const experts_run *run, const hfa_matrix *w, int64_t count) {
    if (run->layer->transposed) return WIDE;
    return count > HFA_DOT_ROWS && w->format != HFA_DENSE ? run->kernels->packed_together : HFA_TILE;
}

/* The hit with the last first_<of> that is not above `index`. */
#define FIND_HIT(RUN, FIELD, INDEX)                                                                                   \
    int64_t h = 0;                                                                                                    \
    for (int64_t above = (RUN)->hit_count; above - h > 1;) {                                                          \
        int64_t middle = (h + above) / 2;                                                                             \
        if ((RUN)->hits[middle].FIELD <= (INDEX)) h = middle;                                                         \
        else above = middle;                                                                                          \
    }

static void pack_group(const experts_run *run, int64_t group, float *rows) {
    FIND_HIT(run, first_group, group)
    const hit *at = &run->hits[h];
    int64_t m0 = (group - at->first_group) * HFA_DOT_ROWS, hidden = run->layer->hidden;
    int m = (int)(at->count - m0 < HFA_DOT_ROWS ? at->count - m0 : HFA_DOT_ROWS);
    for (int i = 0; i < m; i++) {
        int64_t token = run->token + run->sources[at->first + m0 + i] / run->call->choices;
        run->kernels->load((const char *)run->call->x + token * hidden * run->kernels->element, rows + i * hidden, hidden);
    }
    pack_rows(run, at->gate_up, rows, hidden, m, run->x + at->x + group_offset(run, at->gate_up, m0));
}

static void multiply_gate_up(const experts_run *run, int64_t chunk, private_room *mine) {
    FIND_HIT(run, first_chunk, chunk)
    const hit *at = &run->hits[h];
    const hfa_matrix *w = at->gate_up;
    int64_t row = (chunk - at->first_chunk) * at->chunk_rows, end = row + at->chunk_rows < w->rows ? row + at->chunk_rows : w->rows;
    const char *x = run->tokens == 1 ? run->single.packed[w->format] : run->x + at->x;
    int64_t step = tile_rows(run, w, at->count);
    for (; row < end; row += step) {
        int64_t n = end - row < step ? end - row : step;
        for (int64_t m0 = 0; m0 < at->count; m0 += HFA_DOT_ROWS) {
            int m = (int)(at->count - m0 < HFA_DOT_ROWS ? at->count - m0 : HFA_DOT_ROWS);
            multiply(run, w, row, n, x + group_offset(run, w, m0), m, mine->sums, mine->out);
            for (int i = 0; i < m; i++)
                run->kernels->finish_f32(mine->out + i * run->width, bias_at(run, w, row), n, run->mid + (at->first + m0 + i) * run->mid_width + row);
        }
    }
}

/* out = (up + 1) * gate * sigmoid(alpha * gate), every operation rounded; n is a multiple of 16 */
static void swiglu_with_one(const hfa_kernels *kernels, float alpha, float *gate, float *up, int64_t n, float *sigmoid, float *out) {
    for (int64_t i = 0; i < n; i++) sigmoid[i] = gate[i] * alpha;
    kernels->round(sigmoid, n);
    for (int64_t i = 0; i < n; i++) out[i] = -fabsf(sigmoid[i]);
    kernels->exponentials(out, n, 0.0f);
    for (int64_t i = 0; i < n; i++) sigmoid[i] = (sigmoid[i] >= 0.0f ? 1.0f : out[i]) / (1.0f + out[i]);
    kernels->round(sigmoid, n);
    for (int64_t i = 0; i < n; i++) sigmoid[i] *= gate[i];
    for (int64_t i = 0; i < n; i++) up[i] += 1.0f;
    kernels->round(sigmoid, n);
    kernels->round(up, n);
    for (int64_t i = 0; i < n; i++) out[i] = up[i] * sigmoid[i];
    kernels->round(out, n);
}

/* inner [I] of a row of gate and up */
static void apply_gate(const experts_run *run, const float *mid, private_room *mine, float *inner) {
    const hfa_experts *layer = run->layer;
    const hfa_kernels *kernels = run->kernels;
    int64_t count = layer->inner, padded = whole(count);
    float *gate = mine->gate, *up = mine->up, limit = (float)layer->limit;
    if (layer->interleaved)
        for (int64_t i = 0; i < count; i++) {
            gate[i] = mid[2 * i];
            up[i] = mid[2 * i + 1];
        }
    else {
        memcpy(gate, mid, (size_t)count * sizeof(float));
        memcpy(up, mid + count, (size_t)count * sizeof(float));
    }
    memset(gate + count, 0, (size_t)(padded - count) * sizeof(float)); /* whole vectors: no tail with other rounding */
    memset(up + count, 0, (size_t)(padded - count) * sizeof(float));
    if (limit > 0.0f)
        for (int64_t i = 0; i < count; i++) { /* written so that NaN stays */
            gate[i] = gate[i] > limit ? limit : gate[i];
            up[i] = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
        }
    float *out = mine->gated;
    if (layer->alpha != 0.0) swiglu_with_one(kernels, (float)layer->alpha, gate, up, padded, mine->spare, out);
    else kernels->gate((int)layer->activation, gate, up, padded, out);
    memcpy(inner, out, (size_t)count * sizeof(float));
}

static void gate_group(const experts_run *run, int64_t group, private_room *mine) {
    FIND_HIT(run, first_group, group)
    const hit *at = &run->hits[h];
    int64_t m0 = (group - at->first_group) * HFA_DOT_ROWS, count = run->layer->inner;
    int m = (int)(at->count - m0 < HFA_DOT_ROWS ? at->count - m0 : HFA_DOT_ROWS);
    for (int i = 0; i < m; i++) apply_gate(run, run->mid + (at->first + m0 + i) * run->mid_width, mine, mine->rows + i * count);
    pack_rows(run, at->down, mine->rows, count, m, run->inner + at->inner + group_offset(run, at->down, m0));
}

/* Columns of y for all tokens of the block: sum over experts of weight * down(inner). `y` [tokens, width] */
static void multiply_down(const experts_run *run, int64_t chunk, private_room *mine) {
    const hfa_experts_call *call = run->call;
    const hfa_kernels *kernels = run->kernels;
    float *y = mine->y;
    int64_t row = chunk * run->down_rows, hidden = run->layer->hidden;
    int64_t n = hidden - row < run->down_rows ? hidden - row : run->down_rows;
    float *sums = call->sums ? call->sums + run->token * hidden + row : NULL;
    for (int64_t t = 0; t < run->tokens; t++)
        if (sums) memcpy(y + t * run->width, sums + t * hidden, (size_t)n * sizeof(float));
        else memset(y + t * run->width, 0, (size_t)n * sizeof(float));
    for (int64_t h = 0; h < run->hit_count; h++) {
        const hit *at = &run->hits[h];
        const hfa_matrix *w = at->down;
        int64_t step = tile_rows(run, w, at->count);
        for (int64_t r = 0; r < n; r += step) {
            int64_t some = n - r < step ? n - r : step;
            for (int64_t m0 = 0; m0 < at->count; m0 += HFA_DOT_ROWS) {
                int m = (int)(at->count - m0 < HFA_DOT_ROWS ? at->count - m0 : HFA_DOT_ROWS);
                multiply(run, w, row + r, some, run->inner + at->inner + group_offset(run, w, m0), m, mine->sums, mine->out);
                for (int i = 0; i < m; i++) {
                    int64_t source = run->sources[at->first + m0 + i];
                    float *out = mine->out + i * run->width, *to = y + source / call->choices * run->width + r, weight;
                    int64_t place = run->token * call->choices + source;
                    kernels->finish_f32(out, bias_at(run, w, row + r), some, out);
                    if (call->weights_are_f32) weight = ((const float *)call->weights)[place];
                    else kernels->load((const char *)call->weights + place * kernels->element, &weight, 1);
                    for (int64_t j = 0; j < some; j++) out[j] *= weight;
                    if (!call->weights_are_f32) kernels->round(out, some);
                    for (int64_t j = 0; j < some; j++) to[j] += out[j];
                }
            }
        }
    }
    for (int64_t t = 0; sums && t < run->tokens; t++) memcpy(sums + t * hidden, y + t * run->width, (size_t)n * sizeof(float));
    for (int64_t t = 0; t < run->tokens; t++)
        kernels->store(y + t * run->width, (char *)call->y + ((run->token + t) * hidden + row) * kernels->element, n);
}

/* Cuts the memory of a thread into pieces; returns their bytes. */
static size_t lay_out_private(const experts_run *run, char *memory, private_room *mine) {
    const hfa_experts *layer = run->layer;
    int64_t longer = layer->hidden > layer->inner ? layer->hidden : layer->inner, inner = whole(layer->inner);
    int64_t product = HFA_DOT_ROWS * run->width;
    float *at = (float *)memory;
    mine->rows = at, at += whole(HFA_DOT_ROWS * longer);
    mine->gate = at, at += inner;
    mine->up = at, at += inner;
    mine->spare = at, at += inner;
    mine->gated = at, at += inner;
    mine->sums = at, at += product;
    mine->out = at, at += product;
    mine->y = at, at += run->tokens * run->width;
    return aligned((size_t)((char *)at - memory));
}

static void experts_task(void *arg, int thread, int team) {
    experts_run *run = arg;
    private_room mine;
    lay_out_private(run, run->private_memory + run->private_bytes * (size_t)thread, &mine);
    int64_t i;
    if (run->tokens > 1) {
        while ((i = hfa_ranges_take(run->ranges[0], run->threads, thread)) >= 0) pack_group(run, i, mine.rows);
        hfa_barrier_wait(run->barrier, team);
    }
    while ((i = hfa_ranges_take(run->ranges[1], run->threads, thread)) >= 0) multiply_gate_up(run, i, &mine);
    hfa_barrier_wait(run->barrier, team);
    while ((i = hfa_ranges_take(run->ranges[2], run->threads, thread)) >= 0) gate_group(run, i, &mine);
    hfa_barrier_wait(run->barrier, team);
    while ((i = hfa_ranges_take(run->ranges[3], run->threads, thread)) >= 0) multiply_down(run, i, &mine);
}

/* Sorts the rows of the block by expert: fills hits and sources, and counts. */
static void sort_rows(experts_run *run, int64_t *places) {
    const hfa_experts *layer = run->layer;
    const hfa_experts_call *call = run->call;
    int64_t rows = run->tokens * call->choices, total = 0;
    const int64_t *ids = call->ids + run->token * call->choices;
    memset(places, 0, sizeof(int64_t) * (size_t)layer->experts);
    for (int64_t i = 0; i < rows; i++)
        if ((uint64_t)ids[i] < (uint64_t)layer->experts) places[ids[i]]++;
    run->hit_count = 0;
    for (int64_t e = 0; e < layer->experts; e++) {
        int64_t count = places[e];
        if (!count) continue;
        if (call->counts) __atomic_fetch_add(call->counts + e, count, __ATOMIC_RELAXED);
        run->hits[run->hit_count++] = (hit){.gate_up = &layer->gate_up[e], .down = &layer->down[e], .first = total, .count = count};
        places[e] = total;
        total += count;
    }
    for (int64_t i = 0; i < rows; i++)
        if ((uint64_t)ids[i] < (uint64_t)layer->experts) run->sources[places[ids[i]]++] = i;
}

/* Cuts the work of the block into groups and chunks. */
static void plan(experts_run *run, int64_t threads) {
    const hfa_experts *layer = run->layer;
    const hfa_kernels *kernels = run->kernels;
    int64_t total = 0, down = 0, groups = 0, chunks = 0, most = 0;
    size_t x = 0, inner = 0;
    for (int64_t h = 0; h < run->hit_count; h++) {
        total += run->hits[h].gate_up->rows * hfa_row_bytes(kernels, run->hits[h].gate_up);
        down += run->hits[h].down->rows * hfa_row_bytes(kernels, run->hits[h].down);
        most = run->hits[h].count > most ? run->hits[h].count : most;
    }
    run->threads = hfa_useful_threads((total + down) * (most > HFA_DOT_ROWS ? 8 : 1), threads);
    for (int64_t h = 0; h < run->hit_count; h++) {
        hit *at = &run->hits[h];
        const hfa_matrix *w = at->gate_up;
        int m = (int)(at->count < HFA_DOT_ROWS ? at->count : HFA_DOT_ROWS);
        at->x = x, at->inner = inner;
        x += rows_bytes(run, w, at->count);
        inner += rows_bytes(run, at->down, at->count);
        at->first_group = groups;
        groups += (at->count + HFA_DOT_ROWS - 1) / HFA_DOT_ROWS;
        at->chunk_rows = layer->transposed ? WIDE
                                           : hfa_chunk_rows(hfa_rows_together(kernels, w, m), hfa_rows_wanted(kernels, w, m),
                                                            hfa_row_bytes(kernels, w), total, run->threads);
        at->first_chunk = chunks;
        chunks += (w->rows + at->chunk_rows - 1) / at->chunk_rows;
    }
    run->down_rows = layer->hidden / (16 * run->threads) / HFA_LANES * HFA_LANES;
    if (run->down_rows > HFA_TILE || layer->transposed) run->down_rows = run->width;
    if (run->down_rows < HFA_LANES) run->down_rows = HFA_LANES;
    hfa_ranges_deal(run->ranges[0], run->threads, groups);
    hfa_ranges_deal(run->ranges[1], run->threads, chunks);
    hfa_ranges_deal(run->ranges[2], run->threads, groups);
    hfa_ranges_deal(run->ranges[3], run->threads, (layer->hidden + run->down_rows - 1) / run->down_rows);
}

/* The row of a single token, once for every format. */
static void pack_single(experts_run *run, size_t bytes, float *row) {
    run->kernels->load((const char *)run->call->x + run->token * run->layer->hidden * run->kernels->element, row, run->layer->hidden);
    memset(&run->single, 0, sizeof run->single);
    char *to = run->x;
    for (int64_t h = 0; h < run->hit_count; h++) {
        const hfa_matrix *w = run->hits[h].gate_up;
        if (run->single.packed[w->format]) continue;
        pack_rows(run, w, row, run->layer->hidden, 1, run->single.packed[w->format] = to);
        to += bytes;
    }
}

static int is_valid(const hfa_experts *layer, const hfa_experts_call *call) {
    return call->x && call->y && call->ids && call->weights && layer->gate_up && layer->down && call->tokens >= 1 && call->choices >= 1
        && layer->experts >= 1 && layer->hidden >= 1 && layer->inner >= 1 && (uint64_t)layer->dtype < HFA_DTYPES;
}

int hfa_experts_forward(const hfa_experts *layer, const hfa_experts_call *call) {
    if (!is_valid(layer, call)) return -1;
    experts_run run = {.layer = layer, .call = call, .kernels = hfa_active_kernels((int)layer->dtype), .mid_width = whole(2 * layer->inner)};
    run.width = layer->transposed ? WIDE : HFA_TILE;
    int64_t threads = call->threads < 1 ? 1 : call->threads > HFA_MAX_THREADS ? HFA_MAX_THREADS : call->threads;
    int64_t block = BLOCK_BYTES / (call->choices * run.mid_width * (int64_t)sizeof(float));
    if (block < HFA_DOT_ROWS) block = HFA_DOT_ROWS;
    if (block > call->tokens) block = call->tokens;
    int64_t rows = block * call->choices, hits = rows < layer->experts ? rows : layer->experts;
    size_t x_bytes = 0, inner_bytes = 0; /* of a row at most: several rows of an expert take less than each alone */
    for (int64_t e = 0; e < layer->experts; e++) {
        size_t x = rows_bytes(&run, &layer->gate_up[e], 1), inner = rows_bytes(&run, &layer->down[e], 1);
        x_bytes = x > x_bytes ? x : x_bytes;
        inner_bytes = inner > inner_bytes ? inner : inner_bytes;
    }
    private_room unused;
    run.tokens = block;
    run.private_bytes = lay_out_private(&run, NULL, &unused);
    size_t range_bytes = sizeof(hfa_range) * (size_t)threads;
    size_t hit_bytes = aligned(sizeof(hit) * (size_t)hits), source_bytes = aligned(sizeof(int64_t) * (size_t)rows);
    size_t place_bytes = aligned(sizeof(int64_t) * (size_t)layer->experts), mid_bytes = sizeof(float) * (size_t)(rows * run.mid_width);
    char *at = hfa_scratch(sizeof(hfa_barrier) + 4 * range_bytes + hit_bytes + source_bytes + place_bytes + mid_bytes
                           + (size_t)rows * (x_bytes + inner_bytes) + run.private_bytes * (size_t)threads);
    if (!at) return -1;
    run.barrier = (hfa_barrier *)at, at += sizeof(hfa_barrier);
    for (int i = 0; i < 4; i++) run.ranges[i] = (hfa_range *)at, at += range_bytes;
    run.hits = (hit *)at, at += hit_bytes;
    run.sources = (int64_t *)at, at += source_bytes;
    int64_t *places = (int64_t *)at;
    at += place_bytes;
    run.mid = (float *)at, at += mid_bytes;
    run.x = at, at += (size_t)rows * x_bytes;
    run.inner = at, at += (size_t)rows * inner_bytes;
    run.private_memory = at;
    *run.barrier = (hfa_barrier){0};
    for (run.token = 0; run.token < call->tokens; run.token += run.tokens) {
        run.tokens = call->tokens - run.token < block ? call->tokens - run.token : block;
        sort_rows(&run, places);
        plan(&run, threads);
        if (run.tokens == 1) pack_single(&run, x_bytes, (float *)run.private_memory);
        hfa_parallel(experts_task, &run, run.threads);
    }
    return 0;
}
