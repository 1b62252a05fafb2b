/* A whole pre-norm gated decoder layer (Llama, Mistral, Qwen2/3, Phi3, Gemma2/3), or its attention half where experts follow,
 * for up to HFA_MAX_ROWS rows in one parallel region. Phases are separated by barriers; what is small (norms, residual sums, packing) every thread does for itself
 * instead of waiting for one that does. Intermediates are fp32 that hold values of the dtype, rounded at the same
 * points as the eager PyTorch layer rounds them. What the PyTorch layer makes of scores that are not finite depends on which of
 * ATen's attentions runs and on their number, so such a call ends without a result. */
#include <string.h>
#include "drivers/block_attention.h"

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

static size_t lay_out_private(const hfa_block_run *run, char *memory, hfa_block_private *mine) {
    const hfa_block *block = run->block;
    carver c = {memory, 0};
    int64_t attention = block->heads * block->head_dim, wide = padded(larger(block->hidden, attention));
    mine->residual = carve_floats(&c, run->rows * padded(block->hidden));
    mine->wide = carve_floats(&c, run->rows * wide);
    hfa_activations any;
    size_t most = 0;
    const struct { const hfa_products *products; int64_t k; } packs[] = {{&run->qkv, block->hidden}, {&run->output, attention},
                                                                         {&run->gate_up, block->hidden}, {&run->down, block->inner}};
    for (int i = 0; i < 4; i++) {
        size_t bytes = hfa_activations_lay_out(packs[i].products, packs[i].k, NULL, &any);
        if (bytes > most) most = bytes;
    }
    mine->packed = carve(&c, most);
    mine->queries = carve_floats(&c, HFA_QUERY_GROUP * block->head_dim);
    hfa_attend_lay_out(&run->attention, carve(&c, hfa_attend_bytes(&run->attention)), &mine->room);
    mine->ready = -1;
    mine->angles = carve_floats(&c, 3 * HFA_MAX_HEAD_DIM);
    return c.used;
}

static size_t lay_out_shared(hfa_block_run *run, char *memory) {
    const hfa_block *block = run->block;
    carver c = {memory, 0};
    int64_t partials = run->rows * block->heads * run->pieces;
    run->barrier = carve(&c, sizeof(hfa_barrier));
    for (int i = 0; i < 5; i++) run->ranges[i] = carve(&c, sizeof(hfa_range) * (size_t)run->threads);
    run->projected_stride = padded((block->heads + 2 * block->kv_heads) * block->head_dim);
    run->projected = carve_floats(&c, run->rows * run->projected_stride);
    run->summand = carve_floats(&c, run->rows * padded(block->hidden));
    run->inner = carve_floats(&c, run->rows * padded(block->inner));
    run->partial = carve_floats(&c, partials * block->head_dim);
    run->partial_max = carve_floats(&c, partials);
    run->partial_sum = carve_floats(&c, partials);
    return c.used;
}

static void norm_rows(const hfa_block_run *run, const float *x, const void *weight, float *out, int64_t stride_out) {
    const hfa_block *block = run->block;
    for (int r = 0; r < run->rows; r++)
        run->kernels->rms_norm(x + r * padded(block->hidden), weight, block->hidden, (float)block->norm_eps,
                               (int)block->norm_style, out + r * stride_out);
}

/* gate and up for the same rows, then activation(gate) * up */
static void run_gate_up(const hfa_block_run *run, const hfa_activations *x, int self) {
    const hfa_kernels *kernels = run->kernels;
    const hfa_matrix *gate = &run->block->gate, *up = &run->block->up;
    int64_t size = kernels->element;
    float g[HFA_MAX_ROWS * HFA_TILE], u[HFA_MAX_ROWS * HFA_TILE];
    for (int64_t chunk; (chunk = hfa_ranges_take(run->ranges[3], run->threads, self)) >= 0;) {
        int64_t row = chunk * run->gate_rows, end = row + run->gate_rows < gate->rows ? row + run->gate_rows : gate->rows;
        for (; row < end; row += HFA_TILE) {
            int64_t n = end - row < HFA_TILE ? end - row : HFA_TILE;
            hfa_product_tile(kernels, gate, row, n, x, run->rows, g);
            hfa_product_tile(kernels, up, row, n, x, run->rows, u);
            for (int m = 0; m < run->rows; m++) {
                float *gm = g + m * HFA_TILE, *um = u + m * HFA_TILE;
                kernels->finish_f32(gm, gate->bias ? (const char *)gate->bias + row * size : NULL, n, gm);
                kernels->finish_f32(um, up->bias ? (const char *)up->bias + row * size : NULL, n, um);
                memset(gm + n, 0, (size_t)(padded(n) - n) * sizeof(float)); /* whole vectors: no tail with other rounding */
                memset(um + n, 0, (size_t)(padded(n) - n) * sizeof(float));
                kernels->gate((int)run->block->activation, gm, um, padded(n), gm);
                memcpy(run->inner + m * padded(run->block->inner) + row, gm, (size_t)n * sizeof(float));
            }
        }
    }
}

/* q and k of every row, normed over all heads */
static void norm_projected(const hfa_block_run *run, int self, int team) {
    const hfa_block *block = run->block;
    const struct { const void *norm; int64_t from, size; } parts[] = {
        {block->q_norm, 0, block->heads * block->head_dim},
        {block->k_norm, block->heads * block->head_dim, block->kv_heads * block->head_dim}};
    for (int r = self; r < run->rows; r += team)
        for (int i = 0; i < 2; i++) {
            float *x = run->projected + r * run->projected_stride + parts[i].from;
            if (parts[i].norm)
                run->kernels->rms_norm(x, parts[i].norm, parts[i].size, (float)block->norm_eps, (int)block->norm_style, x);
        }
}

/* residual += norm(summand) * residual_scale, rounded; `normed` is room for a row */
static void add_summand(const hfa_block_run *run, const void *norm, float *residual, float *normed, int row) {
    const hfa_block *block = run->block;
    const float *summand = run->summand + row * padded(block->hidden);
    residual += row * padded(block->hidden);
    if (norm) {
        run->kernels->rms_norm(summand, norm, block->hidden, (float)block->norm_eps, (int)block->norm_style, normed);
        summand = normed;
    }
    if (block->residual_scale != 1.0) {
        for (int64_t i = 0; i < block->hidden; i++) normed[i] = summand[i] * (float)block->residual_scale;
        run->kernels->round(normed, block->hidden);
        summand = normed;
    }
    run->kernels->add(residual, summand, block->hidden, residual);
}

static void pack(const hfa_products *products, const float *rows, int64_t stride, int64_t k, hfa_block_private *mine) {
    hfa_activations_lay_out(products, k, mine->packed, &mine->x);
    hfa_activations_pack(products, rows, stride, k, &mine->x);
}

static void block_task(void *arg, int self, int team) {
    hfa_block_run *run = arg;
    const hfa_block *block = run->block;
    const hfa_kernels *kernels = run->kernels;
    int64_t hidden = padded(block->hidden), attention = padded(block->heads * block->head_dim), wide = larger(hidden, attention);
    hfa_block_private mine;
    lay_out_private(run, run->private_memory + run->private_bytes * (size_t)self, &mine);

    for (int r = 0; r < run->rows; r++)
        kernels->load((const char *)run->call->hidden + r * block->hidden * kernels->element, mine.residual + r * hidden, block->hidden);
    norm_rows(run, mine.residual, block->input_norm, mine.wide, wide);
    pack(&run->qkv, mine.wide, wide, block->hidden, &mine);
    hfa_products_run(&run->qkv, &mine.x, run->ranges[0], run->threads, self);
    hfa_barrier_wait(run->barrier, team);
    if (block->norms_rows) {
        norm_projected(run, self, team);
        hfa_barrier_wait(run->barrier, team);
    }

    hfa_attention_run(run, &mine, self);
    hfa_barrier_wait(run->barrier, team);
    if (run->is_strange) return;

    hfa_attention_merge(run, mine.wide, wide);
    pack(&run->output, mine.wide, wide, block->heads * block->head_dim, &mine);
    hfa_products_run(&run->output, &mine.x, run->ranges[2], run->threads, self);
    hfa_barrier_wait(run->barrier, team);

    if (run->is_half) {
        for (int r = self; r < run->rows; r += team) {
            float *residual = mine.residual + r * hidden;
            int64_t at = r * block->hidden * kernels->element;
            add_summand(run, block->attention_out_norm, mine.residual, mine.wide, r);
            kernels->rms_norm(residual, block->mlp_norm, block->hidden, (float)block->norm_eps, (int)block->norm_style, mine.wide);
            kernels->store(residual, (char *)run->call->out + at, block->hidden);
            kernels->store(mine.wide, (char *)run->call->normed + at, block->hidden);
        }
        return;
    }
    for (int r = 0; r < run->rows; r++) add_summand(run, block->attention_out_norm, mine.residual, mine.wide, r);
    norm_rows(run, mine.residual, block->mlp_norm, mine.wide, wide);
    pack(&run->gate_up, mine.wide, wide, block->hidden, &mine);
    run_gate_up(run, &mine.x, self);
    hfa_barrier_wait(run->barrier, team);

    pack(&run->down, run->inner, padded(block->inner), block->inner, &mine);
    hfa_products_run(&run->down, &mine.x, run->ranges[4], run->threads, self);
    hfa_barrier_wait(run->barrier, team);

    for (int r = self; r < run->rows; r += team) {
        add_summand(run, block->mlp_out_norm, mine.residual, mine.wide, r);
        kernels->store(mine.residual + r * hidden, (char *)run->call->out + r * block->hidden * kernels->element, block->hidden);
    }
}

static int is_valid(const hfa_block *block, const hfa_block_call *call) {
    const void *needed[] = {block->q.weight, block->k.weight, block->v.weight, block->o.weight,
                            block->input_norm, block->mlp_norm, call->hidden, call->out, call->keys, call->values};
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
        if (!needed[i]) return 0;
    if (block->gate.weight ? !block->up.weight || !block->down.weight : !call->normed) return 0;
    if (call->rotary && (!call->cos || !call->sin)) return 0;
    if (call->row_past && call->batch <= HFA_MAX_ROWS)
        for (int64_t b = 0; b < call->batch; b++)
            if (call->row_past[b] < call->first || call->row_past[b] > call->past) return 0;
    return call->batch >= 1 && call->tokens >= 1 && call->batch * call->tokens <= HFA_MAX_ROWS && call->first >= 0
        && call->first <= call->past && (uint64_t)block->dtype < HFA_DTYPES && block->head_dim <= HFA_MAX_HEAD_DIM
        && call->rotary <= block->head_dim && call->rotary % 2 == 0 && block->kv_heads >= 1
        && block->heads % block->kv_heads == 0 && (uint64_t)call->format < HFA_CACHE_FORMATS;
}

int hfa_block_forward(const hfa_block *block, const hfa_block_call *call) {
    if (!is_valid(block, call)) return -1;
    const hfa_kernels *kernels = hfa_active_kernels((int)block->dtype);
    hfa_block_run run = {.block = block, .call = call, .kernels = kernels, .single = hfa_active_kernels(HFA_F32),
                         .rows = (int)(call->batch * call->tokens), .is_half = !block->gate.weight};
    run.attention = (hfa_attention){.kernels = kernels, .format = call->format, .key_dim = block->head_dim, .value_dim = block->head_dim,
                                    .scale = (float)block->scale, .softcap = (float)block->softcap};
    int64_t q_size = block->heads * block->head_dim, kv_size = block->kv_heads * block->head_dim, cached = call->past - call->first;
    run.qkv = (hfa_products){.kernels = kernels, .count = 3, .m = run.rows, .keeps_f32 = 1,
                             .item = {{.matrix = &block->q}, {.matrix = &block->k}, {.matrix = &block->v}}};
    run.output = (hfa_products){.kernels = kernels, .count = 1, .m = run.rows, .keeps_f32 = 1, .item = {{.matrix = &block->o}}};
    run.gate_up = (hfa_products){.kernels = kernels, .count = run.is_half ? 0 : 2, .m = run.rows, .item = {{.matrix = &block->gate}, {.matrix = &block->up}}};
    run.down = (hfa_products){.kernels = kernels, .count = !run.is_half, .m = run.rows, .keeps_f32 = 1, .item = {{.matrix = &block->down}}};
    int64_t inner = run.is_half ? 0 : block->inner;
    int64_t gate_row_bytes = run.is_half ? 1 : hfa_row_bytes(kernels, &block->gate) + hfa_row_bytes(kernels, &block->up);
    int64_t bytes = q_size * hfa_row_bytes(kernels, &block->q) + 2 * kv_size * hfa_row_bytes(kernels, &block->k)
                    + block->hidden * (hfa_row_bytes(kernels, &block->o) + (run.is_half ? 0 : hfa_row_bytes(kernels, &block->down)))
                    + inner * gate_row_bytes + call->batch * block->kv_heads * cached * (call->key_stride_s + call->value_stride_s) * hfa_attend_element(&run.attention);
    run.threads = hfa_useful_threads(bytes, call->threads);
    hfa_attention_plan(&run);
    size_t shared_bytes = lay_out_shared(&run, NULL);
    hfa_block_private unused;
    run.private_bytes = (lay_out_private(&run, NULL, &unused) + 4095) / 4096 * 4096;
    char *memory = hfa_scratch(shared_bytes + 4096 + run.private_bytes * (size_t)run.threads);
    if (!memory) return -1;
    lay_out_shared(&run, memory);
    run.private_memory = memory + (shared_bytes + 4095) / 4096 * 4096;
    memset(run.barrier, 0, sizeof *run.barrier);

    float *outputs[] = {run.projected, run.projected + q_size, run.projected + q_size + kv_size};
    for (int i = 0; i < 3; i++) {
        run.qkv.item[i].out = outputs[i];
        run.qkv.item[i].ldo = run.projected_stride;
    }
    run.output.item[0].out = run.down.item[0].out = run.summand;
    run.output.item[0].ldo = run.down.item[0].ldo = padded(block->hidden);
    int64_t together = larger(hfa_rows_together(kernels, &block->gate), hfa_rows_together(kernels, &block->up));
    int64_t wanted = larger(hfa_rows_wanted(kernels, &block->gate, run.rows),
                            hfa_rows_wanted(kernels, &block->up, run.rows));
    run.gate_rows = hfa_chunk_rows(together, wanted, gate_row_bytes, inner * gate_row_bytes, run.threads);
    hfa_ranges_deal(run.ranges[0], run.threads, hfa_products_plan(&run.qkv, run.threads));
    hfa_ranges_deal(run.ranges[1], run.threads, call->batch * block->kv_heads * run.pieces);
    hfa_ranges_deal(run.ranges[2], run.threads, hfa_products_plan(&run.output, run.threads));
    hfa_ranges_deal(run.ranges[3], run.threads, (inner + run.gate_rows - 1) / run.gate_rows);
    hfa_ranges_deal(run.ranges[4], run.threads, hfa_products_plan(&run.down, run.threads));
    hfa_parallel(block_task, &run, run.threads);
    return run.is_strange;
}
