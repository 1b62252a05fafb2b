/* A whole decoder layer, its attention half where experts follow, or its attention alone, for any number of rows, up to PASS of them in one parallel region; a pass finds the keys and values of those before it in the
 * cache. Phases are separated by barriers. What is small (norms, residual sums, packing) every thread does for itself instead of
 * waiting for one that does; of more than HFA_MAX_ROWS rows each does its share, and
 * their attention, where there are tokens beside one another in one buffer, is a region of its own. Intermediates are fp32 that hold values of the dtype, rounded at the same
 * points as the eager PyTorch layer rounds them. What the PyTorch layer makes of scores that are not finite depends on which of
 * ATen's attentions runs and on their number, so such a call ends without a result. */
#include <string.h>
#include "drivers/block_attention.h"

enum { PASS = 128 }; /* rows per read of the weights: scratch memory is proportional to it */

static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Cuts `memory` into pieces; with memory NULL it only counts. */
typedef struct { char *memory; size_t used; } carver;
static void *carve(carver *c, size_t bytes) {
    void *at = c->memory ? c->memory + c->used : NULL;
    c->used += (bytes + 63) / 64 * 64;
    return at;
}
static float *carve_floats(carver *c, int64_t n) { return carve(c, (size_t)n * sizeof(float)); }

/* [R, E], [R, max(E, H D)] and the packed rows: of each thread, or shared. */
static void lay_out_rows(const hfa_block_run *run, carver *c, float **residual, float **wide, char **packed) {
    const hfa_block *block = run->block;
    int64_t attention = block->heads * block->head_dim;
    *residual = carve_floats(c, run->rows * padded(block->hidden));
    *wide = carve_floats(c, run->rows * padded(larger(block->hidden, attention)));
    hfa_activations any;
    size_t most = 0;
    const struct { const hfa_products *products; int64_t k; } packs[] = {{&run->projections, block->hidden}, {&run->output, attention},
                                                                         {&run->gate_up, block->hidden}, {&run->down, block->inner}};
    for (int i = 0; i < 4; i++) {
        size_t bytes = hfa_activations_lay_out(packs[i].products, packs[i].k, NULL, &any);
        if (bytes > most) most = bytes;
    }
    *packed = carve(c, most);
}

static size_t lay_out_private(const hfa_block_run *run, char *memory, hfa_block_private *mine) {
    carver c = {memory, 0};
    if (run->shares) {
        mine->residual = run->residual, mine->wide = run->wide, mine->packed = run->packed;
    } else {
        lay_out_rows(run, &c, &mine->residual, &mine->wide, &mine->packed);
    }
    mine->queries = carve_floats(&c, HFA_QUERY_GROUP * run->block->head_dim);
    hfa_attend_lay_out(&run->attention, carve(&c, hfa_attend_bytes(&run->attention)), &mine->room);
    mine->ready = -1;
    mine->angles = carve_floats(&c, 4 * HFA_MAX_HEAD_DIM);
    return c.used;
}

static size_t lay_out_shared(hfa_block_run *run, char *memory) {
    const hfa_block *block = run->block;
    carver c = {memory, 0};
    run->barrier = carve(&c, sizeof(hfa_barrier));
    for (int i = 0; i < 5; i++) run->ranges[i] = carve(&c, sizeof(hfa_range) * (size_t)run->threads);
    int64_t projected = 0;
    for (int i = 0; i < block->projections; i++) projected += block->projection[i].rows;
    run->projected_stride = padded(projected);
    run->projected = carve_floats(&c, run->rows * run->projected_stride);
    run->summand_stride = padded(block->o.rows);
    run->summand = carve_floats(&c, run->rows * run->summand_stride);
    run->second = block->is_parallel ? carve_floats(&c, run->rows * run->summand_stride) : run->summand;
    run->sinks = block->sinks ? carve_floats(&c, block->heads) : NULL;
    run->inner = carve_floats(&c, run->rows * padded(block->inner));
    int64_t queries = run->rows * block->heads, partials = run->tasks[run->batch] * run->queries;
    if (run->shares) lay_out_rows(run, &c, &run->residual, &run->wide, &run->packed);
    if (run->is_prompt) {
        run->query = carve(&c, (size_t)(queries * block->head_dim * run->kernels->element));
        run->attended = carve(&c, (size_t)(queries * block->head_dim * run->kernels->element));
        run->totals = carve_floats(&c, queries);
        run->starts = carve(&c, (size_t)run->batch * sizeof *run->starts);
    } else {
        run->partial = carve_floats(&c, partials * block->head_dim);
        run->partial_max = carve_floats(&c, partials);
        run->partial_sum = carve_floats(&c, partials);
    }
    return c.used;
}

/* gate and up for the same rows, then activation(gate) * up */
static void run_gate_up(const hfa_block_run *run, const hfa_activations *x, int self) {
    const hfa_kernels *kernels = run->kernels;
    const hfa_matrix *gate = &run->block->gate, *up = &run->block->up;
    int64_t size = kernels->element;
    float g[HFA_BAND_MOST * HFA_BAND_ROWS], u[HFA_BAND_MOST * HFA_BAND_ROWS], gates[HFA_ROOM], ups[HFA_ROOM]; /* or HFA_MAX_ROWS * HFA_TILE, which are fewer */
    int in_bands = hfa_goes_in_bands(gate, run->rows) && hfa_goes_in_bands(up, run->rows);
    int most = in_bands ? hfa_band(kernels, x) : HFA_MAX_ROWS, width = in_bands ? HFA_BAND_ROWS : HFA_TILE;
    int64_t step = hfa_tile_rows(kernels, gate, run->rows), other = hfa_tile_rows(kernels, up, run->rows);
    if (other < step) step = other;
    for (int64_t chunk; (chunk = hfa_ranges_take(run->ranges[3], run->threads, self)) >= 0;) {
        int64_t first = chunk * run->gate_rows, end = first + run->gate_rows < gate->rows ? first + run->gate_rows : gate->rows;
        for (int64_t row = first; row < end; row += step)
            for (int m0 = 0; m0 < run->rows; m0 += most) {
                int m = run->rows - m0 < most ? run->rows - m0 : most;
                int64_t n = end - row < step ? end - row : step;
                if (in_bands) {
                    hfa_product_band(kernels, gate, row, n, x, m0, m, g);
                    hfa_product_band(kernels, up, row, n, x, m0, m, u);
                } else {
                    hfa_product_tile(kernels, gate, row, n, x, m0, m, gates, g);
                    hfa_product_tile(kernels, up, row, n, x, m0, m, ups, u);
                }
                for (int i = 0; i < m; i++) {
                    float *gi = g + i * width, *ui = u + i * width;
                    kernels->finish_f32(gi, gate->bias ? (const char *)gate->bias + row * size : NULL, n, gi);
                    kernels->finish_f32(ui, up->bias ? (const char *)up->bias + row * size : NULL, n, ui);
                    memset(gi + n, 0, (size_t)(padded(n) - n) * sizeof(float)); /* whole vectors: no tail with other rounding */
                    memset(ui + n, 0, (size_t)(padded(n) - n) * sizeof(float));
                    kernels->gate((int)run->block->activation, gi, ui, padded(n), gi);
                    memcpy(run->inner + (m0 + i) * padded(run->block->inner) + row, gi, (size_t)n * sizeof(float));
                }
            }
    }
}

/* q, k and v of every row, normed over all heads */
static void norm_projected(const hfa_block_run *run, int self, int team) {
    const hfa_block *block = run->block;
    const struct { const hfa_norm *norm; int64_t from, heads; } parts[] = {{&block->q_norm, block->q.start, block->heads},
                                                                           {&block->k_norm, block->k.start, block->kv_heads},
                                                                           {&block->v_norm, block->v.start, block->kv_heads}};
    for (int r = self; r < run->rows; r += team)
        for (int i = 0; i < 3; i++) {
            float *x = run->projected + r * run->projected_stride + parts[i].from;
            if (parts[i].norm->kind) run->kernels->norm(x, parts[i].norm, parts[i].heads * block->head_dim, x);
        }
}

/* What a part gives, normed and scaled and rounded: as it is, or in `room` for a row. */
static const float *finished(const hfa_block_run *run, const hfa_norm *norm, const float *summand, float *room) {
    const hfa_block *block = run->block;
    if (norm->kind) {
        run->kernels->norm(summand, norm, block->hidden, room);
        summand = room;
    }
    if (block->residual_scale != 1.0) {
        for (int64_t i = 0; i < block->hidden; i++) room[i] = summand[i] * (float)block->residual_scale;
        run->kernels->round(room, block->hidden);
        summand = room;
    }
    return summand;
}

/* What a part reads: the residual of a row normed, in `room` for a row, or as it is. */
static const float *read_by(const hfa_block_run *run, const hfa_norm *norm, const float *residual, float *room) {
    if (!norm->kind) return residual;
    run->kernels->norm(residual, norm, run->block->hidden, room);
    return room;
}

/* The last of a row: its residual becomes the layer's result. */
static void finish_row(const hfa_block_run *run, float *residual, float *room, int r) {
    const hfa_block *block = run->block;
    int64_t n = block->hidden;
    float *second = run->second + r * run->summand_stride;
    const float *summand = finished(run, &block->mlp_out_norm, second, block->is_parallel ? second : room);
    if (block->is_parallel) { /* second is the row's own room: each row is finished by one thread */
        run->kernels->add(finished(run, &block->attention_out_norm, run->summand + r * run->summand_stride, room), summand, n, room);
        summand = room;
    }
    run->kernels->add(residual, summand, n, residual);
    if (block->out_scale == 1.0) return;
    for (int64_t i = 0; i < n; i++) residual[i] *= (float)block->out_scale;
    run->kernels->round(residual, n);
}

/* Row r of the pass in tensors [B, T, ...] of the call. */
static int64_t row_of_call(const hfa_block_run *run, int r) {
    return (run->sequence + r / run->tokens) * run->call->tokens + run->token + r % run->tokens;
}

/* Rows m0..m0+m that the thread prepares. */
#define EACH_GROUP(m0, m)                                                                                             \
    for (int m0 = my->from, m; m0 < run->rows && (m = run->rows - m0 < HFA_DOT_ROWS ? run->rows - m0 : HFA_DOT_ROWS); m0 += my->step)

static void pack(const hfa_products *products, const float *rows, int64_t stride, int64_t k, int m0, int m, hfa_block_private *mine) {
    hfa_activations_pack(products, rows + m0 * stride, stride, k, m0, m, &mine->x);
}

static void wait_for_rows(const hfa_block_run *run, int team) {
    if (run->shares) hfa_barrier_wait(run->barrier, team);
}

static int64_t wide_of(const hfa_block *block) { return padded(larger(block->hidden, block->heads * block->head_dim)); }

static hfa_block_private private_of(hfa_block_run *run, int self, int team) {
    hfa_block_private mine;
    lay_out_private(run, run->private_memory + run->private_bytes * (size_t)self, &mine);
    mine.from = run->shares ? self * HFA_DOT_ROWS : 0;
    mine.step = HFA_DOT_ROWS * (run->shares ? team : 1);
    return mine;
}

/* Up to the projections. */
static void run_before(hfa_block_run *run, hfa_block_private *my, int self, int team) {
    const hfa_block *block = run->block;
    const hfa_kernels *kernels = run->kernels;
    int64_t hidden = padded(block->hidden), wide = wide_of(block);
    hfa_activations_lay_out(&run->projections, block->hidden, my->packed, &my->x);
    EACH_GROUP(m0, m) {
        for (int r = m0; r < m0 + m; r++) {
            float *residual = my->residual + r * hidden;
            kernels->load((const char *)run->call->hidden + row_of_call(run, r) * block->hidden * kernels->element, residual, block->hidden);
            read_by(run, &block->input_norm, residual, my->wide + r * wide);
        }
        if (block->input_norm.kind) pack(&run->projections, my->wide, wide, block->hidden, m0, m, my);
        else pack(&run->projections, my->residual, hidden, block->hidden, m0, m, my);
    }
    wait_for_rows(run, team);
    hfa_products_run(&run->projections, &my->x, run->ranges[0], run->threads, self);
    hfa_barrier_wait(run->barrier, team);
    if (block->norm_extent == HFA_WHOLE_ROW) {
        norm_projected(run, self, team);
        hfa_barrier_wait(run->barrier, team);
    }
}

/* Attention alone: the product of o is the result. */
static void store_summands(const hfa_block_run *run, int self, int team) {
    int64_t n = run->block->o.rows;
    for (int r = self; r < run->rows; r += team)
        run->kernels->store(run->summand + r * run->summand_stride, (char *)run->call->out + row_of_call(run, r) * n * run->kernels->element, n);
}

/* From the output projection on. */
static void run_after(hfa_block_run *run, hfa_block_private *my, int self, int team) {
    const hfa_block *block = run->block;
    const hfa_kernels *kernels = run->kernels;
    int64_t hidden = padded(block->hidden), attention = block->heads * block->head_dim, wide = wide_of(block);
    int is_half = block->part == HFA_HALF;
    hfa_activations_lay_out(&run->output, attention, my->packed, &my->x);
    EACH_GROUP(m0, m) {
        for (int r = m0; run->is_prompt && r < m0 + m; r++) {
            kernels->load(run->attended + r * attention * kernels->element, my->wide + r * wide, attention);
            hfa_attention_gate(run, my->wide + r * wide, r);
        }
        pack(&run->output, my->wide, wide, attention, m0, m, my);
    }
    wait_for_rows(run, team);
    hfa_products_run(&run->output, &my->x, run->ranges[2], run->threads, self);
    if (run->shares || !block->is_parallel) hfa_barrier_wait(run->barrier, team); /* else what is packed is the thread's own */
    if (block->part == HFA_ATTENTION) {
        store_summands(run, self, team);
        return;
    }

    const hfa_norm *norm = block->is_parallel && !block->mlp_norm.kind ? &block->input_norm : &block->mlp_norm;
    hfa_activations_lay_out(&run->gate_up, block->hidden, my->packed, &my->x);
    EACH_GROUP(m0, m) {
        for (int r = m0; r < m0 + m; r++) {
            float *residual = my->residual + r * hidden, *room = my->wide + r * wide;
            int64_t at = row_of_call(run, r) * block->hidden * kernels->element;
            if (is_half && !run->shares && r % team != self) continue;
            if (!block->is_parallel)
                kernels->add(residual, finished(run, &block->attention_out_norm, run->summand + r * run->summand_stride, room), block->hidden, residual);
            const float *read = read_by(run, norm, residual, room);
            if (!is_half) continue;
            kernels->store(residual, (char *)run->call->out + at, block->hidden);
            kernels->store(read, (char *)run->call->normed + at, block->hidden);
        }
        if (is_half) continue;
        if (norm->kind) pack(&run->gate_up, my->wide, wide, block->hidden, m0, m, my);
        else pack(&run->gate_up, my->residual, hidden, block->hidden, m0, m, my);
    }
    if (is_half) return;
    wait_for_rows(run, team);
    if (block->gate.weight) run_gate_up(run, &my->x, self);
    else hfa_products_run(&run->gate_up, &my->x, run->ranges[3], run->threads, self);
    hfa_barrier_wait(run->barrier, team);

    hfa_activations_lay_out(&run->down, block->inner, my->packed, &my->x);
    EACH_GROUP(m0, m) pack(&run->down, run->inner, padded(block->inner), block->inner, m0, m, my);
    wait_for_rows(run, team);
    hfa_products_run(&run->down, &my->x, run->ranges[4], run->threads, self);
    hfa_barrier_wait(run->barrier, team);

    EACH_GROUP(m0, m)
        for (int r = m0; r < m0 + m; r++) {
            float *residual = my->residual + r * hidden;
            if (!run->shares && r % team != self) continue;
            finish_row(run, residual, my->wide + r * wide, r);
            kernels->store(residual, (char *)run->call->out + row_of_call(run, r) * block->hidden * kernels->element, block->hidden);
        }
}

/* A pass whose attention is computed in its region. */
static void whole_task(void *arg, int self, int team) {
    hfa_block_run *run = arg;
    hfa_block_private mine = private_of(run, self, team);
    run_before(run, &mine, self, team);
    hfa_attention_run(run, &mine, self);
    hfa_barrier_wait(run->barrier, team);
    if (run->is_strange) return;
    hfa_block_private *my = &mine;
    EACH_GROUP(m0, m)
        for (int r = m0; r < m0 + m; r++) hfa_attention_merge(run, r, mine.wide + r * wide_of(run->block));
    run_after(run, &mine, self, team);
}

/* Any other pass, before and after its attention. */
static void before_task(void *arg, int self, int team) {
    hfa_block_run *run = arg;
    hfa_block_private mine = private_of(run, self, team);
    run_before(run, &mine, self, team);
    for (int r = self; r < run->rows; r += team) hfa_attention_prepare(run, &mine, r);
}

static void after_task(void *arg, int self, int team) {
    hfa_block_run *run = arg;
    hfa_block_private mine = private_of(run, self, team);
    run_after(run, &mine, self, team);
}

static int is_valid(const hfa_block *block, const hfa_block_call *call) {
    const void *needed[] = {block->o.weight, call->hidden, call->out, call->rows ? call->rows : call->keys, call->rows ? call->rows : call->values};
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
        if (!needed[i]) return 0;
    if (block->is_parallel && block->part != HFA_LAYER) return 0;
    if (block->projections < 1 || block->projections > HFA_MAX_GROUP || block->heads < 1) return 0;
    for (int i = 0; i < block->projections; i++)
        if (!block->projection[i].weight) return 0;
    if (block->part == HFA_LAYER ? !block->up.weight || !block->down.weight : block->part == HFA_HALF && !call->normed) return 0;
    if (block->rotary) {
        int64_t size = block->rotary_size ? block->rotary_size : call->angles;
        int64_t angles = block->rotary == HFA_PAIRS_OF_HALVES ? size / 2 : size;
        if (!call->cos || !call->sin || size > block->head_dim || size % 2 || angles > call->angles) return 0;
    }
    if (call->row_past)
        for (int64_t b = 0; b < call->batch; b++)
            if (call->row_past[b] < call->first || call->row_past[b] > call->past) return 0;
    if (call->rows && (call->row_past || call->mask_kind != HFA_MASK_NONE)) return 0;
    for (int64_t b = 0; call->rows && b < call->batch; b++) {
        const hfa_row *row = &call->rows[b];
        if (!row->keys || !row->values || row->first < call->first || row->past < row->first || row->past > call->past) return 0;
    }
    return call->batch >= 1 && call->tokens >= 1 && call->first >= 0
        && call->first <= call->past && (uint64_t)block->dtype < HFA_DTYPES && block->head_dim <= HFA_MAX_HEAD_DIM
        && block->kv_heads >= 1 && block->heads % block->kv_heads == 0 && (uint64_t)call->format < HFA_CACHE_FORMATS;
}

/* Sets the products of a pass and returns the bytes of all weights. */
static int64_t choose_products(hfa_block_run *run) {
    const hfa_block *block = run->block;
    const hfa_kernels *kernels = run->kernels;
    hfa_products one = {.kernels = kernels, .count = 1, .m = run->rows, .keeps_f32 = 1, .in_order = run->call->rows != NULL};
    int is_layer = block->part == HFA_LAYER, is_gated = is_layer && block->gate.weight;
    run->projections = run->output = run->gate_up = run->down = one;
    run->projections.count = (int)block->projections;
    run->gate_up.count = is_layer + is_gated;
    run->gate_up.activates = !is_gated;
    run->gate_up.activation = (int)block->activation;
    run->down.count = is_layer;
    for (int i = 0; i < block->projections; i++) run->projections.item[i].matrix = &block->projection[i];
    run->output.item[0].matrix = &block->o;
    run->gate_up.item[0].matrix = is_gated ? &block->gate : &block->up;
    run->gate_up.item[1].matrix = &block->up;
    run->down.item[0].matrix = &block->down;
    const hfa_products *all[] = {&run->projections, &run->output, &run->gate_up, &run->down};
    int64_t bytes = 0;
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < all[i]->count; j++) bytes += all[i]->item[j].matrix->rows * hfa_row_bytes(kernels, all[i]->item[j].matrix);
    return bytes;
}

/* Where the products write, and who computes what. */
static void deal_products(hfa_block_run *run) {
    const hfa_block *block = run->block;
    const hfa_kernels *kernels = run->kernels;
    float *to = run->projected;
    for (int i = 0; i < block->projections; to += block->projection[i++].rows) {
        run->projections.item[i].out = to;
        run->projections.item[i].ldo = run->projected_stride;
    }
    run->output.item[0].out = run->summand;
    run->down.item[0].out = run->second;
    run->output.item[0].ldo = run->down.item[0].ldo = run->summand_stride;
    run->gate_up.item[0].out = run->inner;
    run->gate_up.item[0].ldo = padded(block->inner);
    int64_t chunks;
    if (run->gate_up.count == 2) {
        int64_t row_bytes = hfa_row_bytes(kernels, &block->gate) + hfa_row_bytes(kernels, &block->up);
        int64_t together = larger(hfa_rows_together(kernels, &block->gate, run->rows), hfa_rows_together(kernels, &block->up, run->rows));
        int64_t wanted = larger(hfa_rows_wanted(kernels, &block->gate, run->rows),
                                hfa_rows_wanted(kernels, &block->up, run->rows));
        run->gate_rows = hfa_chunk_rows(together, wanted, row_bytes, block->inner * row_bytes, run->threads);
        chunks = (block->inner + run->gate_rows - 1) / run->gate_rows;
    } else {
        chunks = hfa_products_plan(&run->gate_up, run->threads);
    }
    hfa_ranges_deal(run->ranges[0], run->threads, hfa_products_plan(&run->projections, run->threads));
    hfa_ranges_deal(run->ranges[1], run->threads, run->tasks[run->batch]);
    hfa_ranges_deal(run->ranges[2], run->threads, hfa_products_plan(&run->output, run->threads));
    hfa_ranges_deal(run->ranges[3], run->threads, chunks);
    hfa_ranges_deal(run->ranges[4], run->threads, hfa_products_plan(&run->down, run->threads));
}

/* As hfa_block_forward, of `tokens` tokens from `token` on of `batch` sequences from `sequence` on. */
static int run_pass(const hfa_block *block, const hfa_block_call *call, int64_t sequence, int64_t batch, int64_t token, int64_t tokens) {
    const hfa_kernels *kernels = hfa_active_kernels((int)block->dtype);
    hfa_block_run run = {.block = block, .call = call, .kernels = kernels, .single = hfa_active_kernels(HFA_F32), .sequence = sequence,
                         .batch = batch, .token = token, .tokens = tokens, .rows = (int)(batch * tokens)};
    int64_t tasks[PASS + 1];
    run.tasks = tasks;
    run.shares = run.rows > HFA_MAX_ROWS;
    run.is_prompt = run.shares && !call->rows && call->tokens > 1;
    if (hfa_attention_refuses(&run)) return 1;
    run.attention = (hfa_attention){.kernels = kernels, .format = call->format, .key_dim = block->head_dim, .value_dim = block->head_dim,
                                    .scale = (float)block->scale, .softcap = (float)block->softcap};
    int64_t bytes = choose_products(&run) + hfa_attention_bytes(&run);
    run.threads = hfa_useful_threads(bytes * (run.shares ? run.rows / HFA_DOT_ROWS : 1), call->threads);
    hfa_attention_plan(&run);
    size_t shared_bytes = lay_out_shared(&run, NULL);
    hfa_block_private unused;
    run.private_bytes = (lay_out_private(&run, NULL, &unused) + 4095) / 4096 * 4096;
    char *memory = hfa_scratch(shared_bytes + 4096 + run.private_bytes * (size_t)run.threads);
    if (!memory) return -1;
    lay_out_shared(&run, memory);
    run.private_memory = memory + (shared_bytes + 4095) / 4096 * 4096;
    memset(run.barrier, 0, sizeof *run.barrier);
    if (run.sinks) (block->sinks_are_f32 ? run.single : kernels)->load(block->sinks, run.sinks, block->heads);
    deal_products(&run);
    if (!run.is_prompt) {
        hfa_parallel(whole_task, &run, run.threads);
        return run.is_strange;
    }
    hfa_parallel(before_task, &run, run.threads);
    int status = hfa_attention_of_prompt(&run);
    if (status || run.is_strange) return status ? status : 1;
    hfa_parallel(after_task, &run, run.threads);
    return 0;
}

int hfa_block_forward(const hfa_block *block, const hfa_block_call *call) {
    if (!is_valid(block, call)) return -1;
    int64_t batch = call->batch < PASS ? call->batch : PASS, passes = (call->tokens + PASS / batch - 1) / (PASS / batch);
    int64_t tokens = (call->tokens + passes - 1) / passes; /* of a pass: all about as many */
    if (batch == 1 && passes > 1) tokens = padded(tokens);
    for (int64_t sequence = 0; sequence < call->batch; sequence += batch)
        for (int64_t token = 0; token < call->tokens; token += tokens) {
            int64_t some = call->batch - sequence < batch ? call->batch - sequence : batch;
            int status = run_pass(block, call, sequence, some, token, call->tokens - token < tokens ? call->tokens - token : tokens);
            if (status) return status;
        }
    return 0;
}
