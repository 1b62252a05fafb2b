/* Chooses tokens from logits: what transformers' processors leave and torch.multinomial draws, by selection in the place of sorts.
 *
 * A value has one of three states: kept, removed, or `maybe`, where the processors' own rounding or the order in which their sort
 * leaves equal values decides. The draw is a race, argmax(p / q) over exponentials q, so that a maybe matters only where it wins, or
 * comes near; then there is no result, and the caller asks the processors themselves. q of a value is a function of two words of the
 * generator: all words are passed, and only those of values that are not removed are looked at. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "kernels.h"
#include "threads.h"

enum { UNDECIDED = 1, WORDS = HFA_TWISTER_WORDS, LEVELS = 2048 };
#define NEAR 2e-5         /* of weights: exponentials of either side are within 20 ulp, products and quotients within one */
#define ROUNDING 6e-8     /* half an ulp, of each addition to a sum */
#define LEAST_THRESHOLD 1e-30f /* quotients near zero are equal for many a dividend */

/* torch's CPUGeneratorImplState, as far as it is of interest */
typedef struct { uint64_t seed; int32_t left, seeded; uint64_t next, words[WORDS]; } generator_state;
/* word i of the stream is words[i - base] */
typedef struct { uint32_t words[WORDS]; int64_t base; void (*twist)(uint32_t *words); } stream;
typedef struct { float score, weight; int32_t id, maybe; } candidate;

static inline uint32_t word_at(stream *s, int64_t i) {
    while (i - s->base >= WORDS) {
        s->twist(s->words);
        s->base += WORDS;
    }
    uint32_t y = s->words[i - s->base];
    y ^= y >> 11;
    y ^= y << 7 & 0x9d2c5680u;
    y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

/* At most the uniform number of draw i, of its first 21 bits. */
static inline float least_uniform_at(stream *s, int64_t i) { return (float)(word_at(s, 2 * i) & ((1u << 21) - 1)) * 0x1p-21f; }

/* uniform in [0, 1): draw i of the stream, in double precision as torch makes it */
static inline double uniform_at(stream *s, int64_t i) {
    uint64_t high = word_at(s, 2 * i), low = word_at(s, 2 * i + 1);
    return (double)((high << 32 | low) & ((1ull << 53) - 1)) * 0x1p-53;
}

static int open_stream(stream *s, const generator_state *state, void (*twist)(uint32_t *)) {
    if (!state->seeded || state->left < 1 || state->left > WORDS || (state->left > 1 && state->next != (uint64_t)(WORDS + 1 - state->left)))
        return -1;
    for (int i = 0; i < WORDS; i++) s->words[i] = (uint32_t)state->words[i];
    s->base = state->left == 1 ? -WORDS : -(int64_t)state->next;
    s->twist = twist;
    return 0;
}

/* Leaves the generator as it is after `words` words. */
static void close_stream(stream *s, int64_t words, generator_state *state) {
    word_at(s, words - 1);
    for (int i = 0; i < WORDS; i++) state->words[i] = s->words[i];
    state->next = (uint64_t)(words - s->base);
    state->left = (int32_t)(WORDS + 1 - state->next);
}

/* The k-th largest of x [n], which is reordered. */
static float largest(float *x, int64_t n, int64_t k) {
    int64_t low = 0, high = n - 1, at = k - 1;
    while (low < high) {
        float pivot = x[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i <= j) {
                float t = x[i];
                x[i++] = x[j];
                x[j--] = t;
            }
        }
        if (at <= j) high = j;
        else if (at >= i) low = i;
        else break;
    }
    return x[at];
}

static int rising(const void *a, const void *b) {
    float x = (*(candidate *const *)a)->score, y = (*(candidate *const *)b)->score;
    return (x > y) - (x < y);
}

static inline float penalised(float score, float penalty) { return score < 0.0f ? score * penalty : score / penalty; }

static inline float tempered(float score, const hfa_choose_call *call) {
    return call->temperature > 0.0 ? score / (float)call->temperature : score;
}

typedef struct { float *scores, *maxima, *values; candidate *found, **order; int64_t padded, block; } room;

/* Values that stay after temperature and top-k, in the order of their ids; -1: undecided. */
static int64_t select_top(const hfa_choose_call *call, room *r, int64_t k) {
    int64_t vocabulary = call->vocabulary, blocks = r->padded / r->block, count = 0;
    float least = -INFINITY;
    if (k <= blocks) { /* so many blocks have a value that is not below */
        memcpy(r->values, r->maxima, sizeof(float) * (size_t)blocks);
        least = largest(r->values, blocks, k);
        least -= fabsf(least) * 0x1p-21f; /* quotients of near values may be equal */
    }
    for (int64_t j = 0; j < blocks; j++) {
        if (r->maxima[j] < least) continue;
        int64_t end = (j + 1) * r->block < vocabulary ? (j + 1) * r->block : vocabulary;
        for (int64_t i = j * r->block; i < end; i++)
            if (r->scores[i] >= least && r->scores[i] > -INFINITY) {
                r->values[count] = r->scores[i];
                r->found[count++] = (candidate){.score = tempered(r->scores[i], call), .id = (int32_t)i};
            }
    }
    if (count < k) return count; /* the others are -inf, as is the k-th */
    float threshold = tempered(largest(r->values, count, k), call);
    if (call->temperature > 0.0 && fabsf(threshold) < LEAST_THRESHOLD) return -1;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++)
        if (r->found[i].score >= threshold) r->found[kept++] = r->found[i];
    return kept;
}

/* Sums up to which values are removed by top-p for certain (low), or perhaps (high), where n values sum up to `total`. */
typedef struct { double total, low, high; } limits;
static limits limits_of(const hfa_choose_call *call, int64_t n, double total) {
    double limit = (double)(float)(1.0 - call->top_p) * total;
    double close = NEAR + ROUNDING * (64.0 + (double)(n < call->vocabulary / 4 ? n : call->vocabulary / 4)); /* 4 lanes at least */
    return (limits){total, limit * (1.0 - close), limit * (1.0 + close)};
}

static double sum_of(const float *x, int64_t n) { /* n a multiple of 8 */
    double parts[8] = {0.0};
    for (int64_t i = 0; i < n; i += 8)
        for (int j = 0; j < 8; j++) parts[j] += (double)x[i + j];
    for (int j = 1; j < 8; j++) parts[0] += parts[j];
    return parts[0];
}

/* Which of the candidates, beside values that weigh `below` and are removed, top-p leaves: removed from below as long as their sum,
 * each one's own weight included, is at most 1 - p of all; the last one stays. Returns how many there are then. */
static int64_t keep_top_p(room *r, int64_t count, limits sums, double below) {
    double low = sums.low, high = sums.high;
    /* only the values near the limit need an order: levels of an eighth of a power of two find them */
    double mass[LEVELS];
    float floor = 0.0f, roof = INFINITY;
    if (count > 256) {
        memset(mass, 0, sizeof mass);
        uint32_t bits;
        for (int64_t i = 0; i < count; i++) {
            memcpy(&bits, &r->found[i].weight, 4);
            mass[bits >> 20] += (double)r->found[i].weight;
        }
        int level = 0;
        for (; level < LEVELS && below + mass[level] < low; level++) below += mass[level];
        bits = (uint32_t)level << 20;
        memcpy(&floor, &bits, 4);
        double upto = below;
        for (; level < LEVELS && upto <= high; level++) upto += mass[level];
        bits = (uint32_t)level << 20;
        if (level < LEVELS) memcpy(&roof, &bits, 4);
    }
    int64_t near = 0, kept = 0;
    for (int64_t i = 0; i < count; i++) {
        r->order[near] = &r->found[i];
        near += r->found[i].weight >= floor && r->found[i].weight < roof;
    }
    qsort(r->order, (size_t)near, sizeof *r->order, rising);
    for (int64_t i = 0, next; i < near; i = next) {
        double weight = (double)r->order[i]->weight, first = below + weight;
        for (next = i; next < near && r->order[next]->score == r->order[i]->score; next++) below += weight;
        int is_last = next == near && roof == INFINITY && next - i == 1;
        int state = is_last || first > high ? 0 : below < low && !(next == near && roof == INFINITY) ? -1 : 1;
        for (int64_t j = i; j < next; j++) r->order[j]->maybe = state;
    }
    for (int64_t i = 0; i < count; i++) {
        r->found[kept] = r->found[i];
        kept += r->found[i].weight >= floor && r->found[i].maybe >= 0;
    }
    return kept;
}

/* What min-p leaves: all of at least min_p times the highest weight, which is 1. */
static int64_t keep_min_p(const hfa_choose_call *call, room *r, int64_t count, float top) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) {
        candidate c = r->found[i];
        double weight = (double)c.weight;
        if (c.score != top && weight < call->min_p * (1.0 - NEAR)) continue;
        if (c.score != top && weight < call->min_p * (1.0 + NEAR)) c.maybe = 1;
        r->found[kept++] = c;
    }
    return kept;
}

/* The winner of a race, which has draws from draw `first` on. */
typedef struct { stream *draws; int64_t first, winner; double best, second; float bar; int maybe; } race;

static inline void enter(race *r, int64_t id, float weight, int maybe) {
    /* an exponential is at least as large as its uniform number */
    if (weight < least_uniform_at(r->draws, r->first + id) * r->bar) return;
    double ratio = (double)weight / -log1p(-uniform_at(r->draws, r->first + id));
    if (ratio > r->best) {
        r->second = r->best;
        r->best = ratio;
        r->winner = id;
        r->maybe = maybe;
    } else if (ratio > r->second) r->second = ratio;
    r->bar = (float)r->second * (1.0f - 1e-6f); /* what comes to less is neither the best nor near it */
}

/* -1: it is not clear who it is. */
static int64_t winner_of(const race *r) {
    return !(r->best < INFINITY) || r->maybe || r->second > r->best * (1.0 - NEAR) ? -1 : r->winner;
}

/* Logits of row b in fp32, with the penalty; padded with -inf. */
static const float *scores_of(const hfa_choose_call *call, room *r, int64_t b) {
    const hfa_kernels *kernels = hfa_active_kernels((int)call->dtype);
    const char *row = (const char *)call->logits + b * call->stride * kernels->element;
    kernels->load(row, r->scores, call->vocabulary);
    for (int64_t i = call->vocabulary; i < r->padded; i++) r->scores[i] = -INFINITY;
    for (int64_t t = call->starts ? call->starts[b] : 0; call->penalty > 0.0 && t < call->length; t++) {
        int64_t id = call->ids[b * call->length + t];
        if (id < 0) return NULL;
        if (id >= call->vocabulary) continue;
        float score; /* as it was: a token may come twice */
        kernels->load(row + id * kernels->element, &score, 1);
        r->scores[id] = penalised(score, (float)call->penalty);
    }
    return r->scores;
}

/* Candidates after temperature, top-k and top-p. */
static int64_t keep_top_k(const hfa_choose_call *call, room *r, int64_t k, float highest) {
    int64_t count = select_top(call, r, k), padded = (count + 15) / 16 * 16;
    for (int64_t i = 0; i < count; i++) r->values[i] = r->found[i].score;
    for (int64_t i = count; i < padded; i++) r->values[i] = -INFINITY;
    if (count > 0) hfa_active_kernels(HFA_F32)->exponentials(r->values, padded, highest);
    for (int64_t i = 0; i < count; i++) r->found[i].weight = r->values[i];
    return count < 0 || call->top_p >= 1.0 ? count : keep_top_p(r, count, limits_of(call, count, sum_of(r->values, padded)), 0.0);
}

/* The weights of all values. */
static void weigh_all(const hfa_choose_call *call, room *r, float highest) {
    for (int64_t i = 0; i < r->padded; i++) r->values[i] = tempered(r->scores[i], call);
    hfa_active_kernels(HFA_F32)->exponentials(r->values, r->padded, highest);
}

/* The same without top-k: all values, but for those that top-p or min-p remove for certain. */
static int64_t keep_of_all(const hfa_choose_call *call, room *r, float highest) {
    weigh_all(call, r, highest);
    limits sums = {0};
    float least = 0.0f;
    if (call->top_p < 1.0) {
        sums = limits_of(call, call->vocabulary, sum_of(r->values, r->padded));
        least = (float)(sums.low / (double)call->vocabulary * (1.0 - 1e-6)); /* all below together are not more than `low` */
    } else if (call->min_p > 0.0) least = (float)(call->min_p * (1.0 - 2.0 * NEAR));
    int64_t count = 0;
    double kept = 0.0;
    for (int64_t j = 0; j < r->padded / r->block; j++) {
        if (expf(tempered(r->maxima[j], call) - highest) < 0.99f * least) continue;
        int64_t end = (j + 1) * r->block < call->vocabulary ? (j + 1) * r->block : call->vocabulary;
        for (int64_t i = j * r->block; i < end; i++) { /* without a branch, which none could foresee */
            r->found[count] = (candidate){.score = r->scores[i], .weight = r->values[i], .id = (int32_t)i};
            count += r->values[i] >= least && r->values[i] > 0.0f;
        }
    }
    for (int64_t i = 0; i < count; i++) {
        r->found[i].score = tempered(r->found[i].score, call);
        kept += (double)r->found[i].weight;
    }
    return call->top_p >= 1.0 ? count : keep_top_p(r, count, sums, sums.total > kept ? sums.total - kept : 0.0);
}

static int choose_row(const hfa_choose_call *call, room *r, stream *s, int64_t b) {
    const hfa_kernels *kernels = hfa_active_kernels((int)call->dtype);
    if (!scores_of(call, r, b) || !kernels->block_maxima(r->scores, r->padded, r->block, r->maxima)) return UNDECIDED;
    float top = -INFINITY;
    for (int64_t j = 0; j < r->padded / r->block; j++) top = r->maxima[j] > top ? r->maxima[j] : top;
    if (top == -INFINITY) return UNDECIDED;
    if (!s) { /* greedy: the first of equal ones */
        int64_t j = 0, i;
        while (r->maxima[j] < top) j++;
        for (i = j * r->block; r->scores[i] < top;) i++;
        call->tokens[b] = i;
        return 0;
    }
    float highest = tempered(top, call);
    if (!isfinite(highest)) return UNDECIDED;
    int64_t k = call->top_k > 0 && call->top_k < call->vocabulary ? call->top_k : 0;
    race one = {.draws = s, .first = b * call->vocabulary, .winner = -1};
    if (!k && call->top_p >= 1.0 && call->min_p <= 0.0) {
        weigh_all(call, r, highest);
        for (int64_t i = 0; i < call->vocabulary; i++) enter(&one, i, r->values[i], 0);
    } else {
        int64_t count = k ? keep_top_k(call, r, k, highest) : keep_of_all(call, r, highest);
        if (count < 0) return UNDECIDED;
        if (call->min_p > 0.0) count = keep_min_p(call, r, count, highest);
        for (int64_t i = 0; i < count; i++) enter(&one, r->found[i].id, r->found[i].weight, r->found[i].maybe);
    }
    call->tokens[b] = winner_of(&one);
    return call->tokens[b] < 0 ? UNDECIDED : 0;
}

int hfa_choose(const hfa_choose_call *call) {
    if (!call->logits || !call->tokens || (uint64_t)call->dtype >= HFA_DTYPES || call->rows < 1 || call->vocabulary < 1
        || call->vocabulary > INT32_MAX / 2 || call->length < 0 || (call->penalty > 0.0 && call->length && !call->ids))
        return -1;
    for (int64_t b = 0; call->starts && b < call->rows; b++)
        if (call->starts[b] < 0) return -1;
    room r = {.padded = (call->vocabulary + 127) / 128 * 128};
    r.block = r.padded / 128 >= 2 * call->top_k && r.padded >= 8192 ? 128 : 32;
    size_t n = (size_t)r.padded;
    char *memory = hfa_scratch((n + 1) * (2 * sizeof(float) + sizeof(candidate) + sizeof(candidate *)) + n / 32 * sizeof(float));
    if (!memory) return -1;
    r.found = (candidate *)memory;
    r.order = (candidate **)(r.found + n + 1);
    r.scores = (float *)(r.order + n + 1);
    r.values = r.scores + n;
    r.maxima = r.values + n;
    stream s;
    if (call->state && open_stream(&s, call->state, hfa_active_kernels((int)call->dtype)->twist)) return -1;
    for (int64_t b = 0; b < call->rows; b++) {
        int status = choose_row(call, &r, call->state ? &s : NULL, b);
        if (status) return status;
    }
    if (call->state) close_stream(&s, 2 * call->rows * call->vocabulary, call->state);
    return 0;
}

int hfa_exponentials(void *state, float *out, int64_t n) {
    stream s;
    if (n < 1 || open_stream(&s, state, hfa_active_kernels(HFA_F32)->twist)) return -1;
    for (int64_t i = 0; i < n; i++) out[i] = (float)-log1p(-uniform_at(&s, i));
    close_stream(&s, 2 * n, state);
    return 0;
}
