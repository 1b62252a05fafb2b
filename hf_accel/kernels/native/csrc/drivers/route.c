/* The router of a mixture for few tokens: logits, the experts with the highest ones, and their weights. */
#include <math.h>
#include "drivers/product.h"

enum { MOST_EXPERTS = 512 };

/* The `count` highest of s [n] in falling order, taken out of it; 0 where the last of them is equal to one that is left out:
 * which of the two PyTorch chooses is its own business. */
static int highest(float *s, int64_t n, int64_t count, int64_t *ids, float *found) {
    for (int64_t j = 0; j <= count && j < n; j++) {
        int64_t best = 0;
        for (int64_t i = 1; i < n; i++)
            if (s[i] > s[best]) best = i;
        if (j == count) return s[best] != found[j - 1];
        ids[j] = best;
        found[j] = s[best];
        s[best] = -INFINITY;
    }
    return 1;
}

int hfa_route(const hfa_route_call *call) {
    if (!call->x || !call->weight || !call->logits || !call->weights || !call->ids || (uint64_t)call->dtype >= HFA_DTYPES
        || call->tokens < 1 || call->tokens > HFA_MAX_ROWS || call->experts > MOST_EXPERTS || call->choices < 1
        || call->choices > call->experts)
        return -1;
    const hfa_kernels *kernels = hfa_active_kernels((int)call->dtype);
    int failed = hfa_linear(call->x, call->weight, call->bias, call->logits, call->tokens, call->hidden, call->experts, call->stride,
                            call->dtype | call->threads << 16);
    if (failed) return failed;
    for (int64_t t = 0; t < call->tokens; t++) {
        float logits[MOST_EXPERTS], weights[MOST_EXPERTS], sum = 0.0f;
        int64_t n = call->experts, k = call->choices;
        kernels->load((const char *)call->logits + t * n * kernels->element, logits, n);
        float all = 0.0f, top = logits[0];
        for (int64_t i = 0; i < n; i++) {
            if (!isfinite(logits[i])) return 1;
            top = logits[i] > top ? logits[i] : top;
        }
        for (int64_t i = 0; !call->is_normed && i < n; i++) all += expf(logits[i] - top);
        if (!highest(logits, n, k, call->ids + t * k, weights)) return 1;
        for (int64_t j = 0; j < k; j++) {
            weights[j] = expf(weights[j] - top);
            sum += weights[j];
        }
        for (int64_t j = 0; j < k; j++) weights[j] /= call->is_normed ? sum : all;
        if (call->weights_are_f32)
            for (int64_t j = 0; j < k; j++) ((float *)call->weights)[t * k + j] = weights[j];
        else kernels->store(weights, (char *)call->weights + t * k * kernels->element, k);
    }
    return 0;
}
