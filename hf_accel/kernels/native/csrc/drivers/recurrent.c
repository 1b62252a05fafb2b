/* One token of a recurrent mixer: the short convolution, the step of the state, and the norm, in one parallel region. */
#include "kernels.h"
#include "threads.h"

enum { CHANNELS = 256, SCANNED = 64 };

typedef struct {
    const hfa_mixer *mixer;
    const hfa_mixer_call *call;
    const hfa_recurrent_kernels *kernels;
    float *rows, *cores; /* [batch, channels] after the convolution; [batch, heads * value_dim] */
    hfa_range *ranges;   /* [3, threads]: of the phases */
    int threads;
    hfa_barrier barrier;
} mixer_run;

static int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

/* How many tasks of one sequence each phase has. */
static void count_tasks(const hfa_mixer *mixer, int64_t *tasks) {
    tasks[0] = mixer->kind == HFA_MIX_SCAN ? 0 : pieces(mixer->channels, CHANNELS);
    tasks[1] = mixer->kind == HFA_MIX_CONV ? 0 : mixer->kind == HFA_MIX_SCAN ? pieces(mixer->heads, SCANNED) : mixer->heads;
    tasks[2] = mixer->kind == HFA_MIX_SSD && mixer->norm_size ? mixer->heads * mixer->value_dim / mixer->norm_size : 0;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void mixer_task(void *arg, int thread, int team) {
    mixer_run *run = arg;
    const hfa_mixer *mixer = run->mixer;
    int64_t tasks[3], task;
    count_tasks(mixer, tasks);
    for (int phase = 0; phase < 3; phase++) {
        if (!tasks[phase]) continue;
        while ((task = hfa_ranges_take(run->ranges + phase * run->threads, run->threads, thread)) >= 0) {
            int64_t b = task / tasks[phase], i = task % tasks[phase];
            float *row = run->rows + b * mixer->channels, *core = run->cores + b * mixer->heads * mixer->value_dim;
            if (phase == 0) run->kernels->conv(mixer, run->call, b, i * CHANNELS, least((i + 1) * CHANNELS, mixer->channels), row);
            else if (phase == 2) run->kernels->norm(mixer, run->call, b, i, core);
            else if (mixer->kind == HFA_MIX_DELTA) run->kernels->delta(mixer, run->call, b, i, row, core);
            else if (mixer->kind == HFA_MIX_SSD) run->kernels->ssd(mixer, run->call, b, i, row, core);
            else run->kernels->scan(mixer, run->call, b, i * SCANNED, least((i + 1) * SCANNED, mixer->heads));
        }
        if (phase < 2 && tasks[phase + 1]) hfa_barrier_wait(&run->barrier, team);
    }
}

static int is_span(const hfa_span *span, int64_t count) {
    return span->count == count && (uint64_t)span->source < HFA_MIX_SOURCES && span->chunk > 0;
}

static int has_convolution(const hfa_mixer *mixer) {
    int64_t count = 0;
    for (int i = 0; i < 3; i++) {
        count += mixer->part[i].count;
        if (mixer->part[i].count && !is_span(&mixer->part[i], mixer->part[i].count)) return 0;
    }
    return count == mixer->channels && mixer->taps >= 2 && mixer->taps <= HFA_MAX_TAPS && mixer->conv_weight
           && (!mixer->before.count || is_span(&mixer->before, mixer->channels));
}

static int is_sound(const hfa_mixer *mixer) {
    int64_t inner = mixer->heads * mixer->value_dim, rows = mixer->groups * mixer->key_dim;
    if ((uint64_t)mixer->dtype >= HFA_DTYPES || (mixer->kind != HFA_MIX_SCAN && !has_convolution(mixer))) return 0;
    if (mixer->kind == HFA_MIX_CONV) return !mixer->gate.count || is_span(&mixer->gate, mixer->channels);
    if (mixer->heads < 1 || mixer->key_dim < 1 || mixer->key_dim > HFA_MAX_STATE) return 0;
    if (mixer->kind != HFA_MIX_DELTA && (!mixer->a_log || !mixer->dt_bias)) return 0;
    if (!is_span(&mixer->rate, mixer->heads)) return 0;
    if (mixer->kind == HFA_MIX_SCAN)
        return mixer->d && is_span(&mixer->part[0], mixer->heads) && is_span(&mixer->part[1], mixer->key_dim)
               && is_span(&mixer->part[2], mixer->key_dim) && is_span(&mixer->gate, mixer->heads);
    if (mixer->value_dim < 1 || mixer->value_dim > HFA_MAX_STATE || mixer->groups < 1 || mixer->heads % mixer->groups) return 0;
    if (mixer->channels != inner + 2 * rows || (mixer->gate.count && !is_span(&mixer->gate, inner))) return 0;
    if (mixer->norm_size
        && (inner % mixer->norm_size || !mixer->gate.count || !mixer->norm_weight || mixer->norm_rows < mixer->norm_size
            || mixer->norm_rows % mixer->norm_size))
        return 0;
    if (mixer->kind == HFA_MIX_DELTA) return mixer->norm_size == mixer->value_dim && is_span(&mixer->beta, mixer->heads);
    return mixer->kind == HFA_MIX_SSD && mixer->d;
}

int hfa_mixer_step(const hfa_mixer *mixer, const hfa_mixer_call *call) {
    if (!is_sound(mixer) || !call->source[0] || !call->out || call->batch < 1) return -1;
    if ((mixer->kind != HFA_MIX_SCAN && !call->conv_state) || (mixer->kind != HFA_MIX_CONV && !call->state)) return -1;
    if (mixer->kind == HFA_MIX_DELTA && !call->decay && (!mixer->a_log || !mixer->dt_bias)) return -1;
    mixer_run run = {.mixer = mixer, .call = call, .kernels = hfa_active_kernels((int)mixer->dtype)->recurrent};
    run.threads = call->threads < 1 ? 1 : call->threads > HFA_MAX_THREADS ? HFA_MAX_THREADS : (int)call->threads;
    int64_t rows = call->batch * mixer->channels, cores = call->batch * mixer->heads * mixer->value_dim, tasks[3];
    size_t ranges = sizeof(hfa_range) * 3 * (size_t)run.threads;
    char *scratch = hfa_scratch(ranges + sizeof(float) * (size_t)(rows + cores));
    if (!scratch) return -1;
    run.ranges = (hfa_range *)scratch;
    run.rows = (float *)(scratch + ranges);
    run.cores = run.rows + rows;
    count_tasks(mixer, tasks);
    for (int phase = 0; phase < 3; phase++) hfa_ranges_deal(run.ranges + phase * run.threads, run.threads, call->batch * tasks[phase]);
    hfa_parallel(mixer_task, &run, run.threads);
    return 0;
}
