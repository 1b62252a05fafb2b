/* One token of recurrent mixers, see hfa_mixer in native.h; included once per dtype and instruction set by dtype_body.h.
 *
 * Every value is rounded to the dtype where the operators of PyTorch round it; the states are fp32. Tasks are a stretch of
 * channels, a head or a group of a norm, of one sequence. */

enum { NAME(BLOCK) = 64 };

/* Values begin..begin + n of a span as fp32. */
static void NAME(gather)(const void *source, const hfa_span *span, int64_t begin, int64_t n, float *out) {
    const T *row = (const T *)source + span->start;
    while (n > 0) {
        int64_t offset = begin % span->chunk, m = span->chunk - offset < n ? span->chunk - offset : n;
        NAME(load)(row + begin / span->chunk * span->stride + offset, out, m);
        begin += m, out += m, n -= m;
    }
}

static void NAME(gather_of)(const hfa_mixer_call *call, const hfa_span *span, int64_t b, int64_t begin, int64_t n, float *out) {
    NAME(gather)((const T *)call->source[span->source] + b * call->step[span->source], span, begin, n, out);
}

static float NAME(gather_one)(const hfa_mixer_call *call, const hfa_span *span, int64_t b, int64_t i) {
    float value;
    NAME(gather_of)(call, span, b, i, 1, &value);
    return value;
}

/* Channels begin..begin + n of the parts, one after the other. */
static void NAME(gather_parts)(const hfa_mixer *mixer, const hfa_mixer_call *call, int64_t b, int64_t begin, int64_t n, float *out) {
    for (int part = 0; part < 3 && n > 0; part++) {
        const hfa_span *span = &mixer->part[part];
        int64_t m = span->count - begin < n ? span->count - begin : n;
        if (m > 0) {
            NAME(gather_of)(call, span, b, begin, m, out);
            begin += m, out += m, n -= m;
        }
        begin -= span->count;
    }
}

/* A parameter's values: of the dtype, or of fp32. */
static void NAME(load_as)(const void *values, int is_f32, int64_t begin, int64_t n, float *out) {
    if (is_f32) memcpy(out, (const float *)values + begin, (size_t)n * sizeof(float));
    else NAME(load)((const T *)values + begin, out, n);
}

/* x * sigmoid(x), or sigmoid(x), not rounded; n is a multiple of VW */
static void NAME(sigmoids)(float *x, int64_t n, int is_silu) {
    vf one = vf_set1(1.0f), zero = vf_set1(0.0f);
    for (int64_t i = 0; i < n; i += VW) {
        vf v = vf_load(x + i);
        vf_store(x + i, vf_div(is_silu ? v : one, vf_add(one, vf_exp(vf_sub(zero, v)))));
    }
}

static float NAME(softplus)(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

/* log(1 + exp(x)) = max(x, 0) + log1p(t), t = exp(-|x|) <= 1, and log1p(t) = 2 artanh(s), s = t / (2 + t) <= 1/3, by its series. */
HFA_INLINE vf NAME(softplus_of)(vf x) {
    vf zero = vf_set1(0.0f), t = vf_exp(vf_sub(zero, vf_abs(x))), s = vf_div(t, vf_add(vf_set1(2.0f), t)), z = vf_mul(s, s);
    vf p = vf_set1(2.0f / 13);
    for (int n = 11; n > 0; n -= 2) p = vf_fma(p, z, vf_set1(2.0f / (float)n));
    return vf_fma(p, s, vf_max(zero, x));
}

HFA_INLINE void NAME(taps)(T *state, const T *weight, const float *x, int64_t n, int64_t taps, float *out) {
    for (int64_t i = 0; i < n; i++, state += taps, weight += taps) {
        float sum = x[i] * LOAD1(weight + taps - 1);
        for (int64_t j = 0; j < taps - 1; j++) {
            sum += LOAD1(state + j + 1) * LOAD1(weight + j);
            state[j] = state[j + 1];
        }
        STORE1(state + taps - 1, x[i]);
        out[i] = sum;
    }
}

/* Channels begin..end of the convolution and what follows it, into `row` [channels], or of HFA_MIX_CONV into `out`. */
static void NAME(mix_conv)(const hfa_mixer *mixer, const hfa_mixer_call *call, int64_t b, int64_t begin, int64_t end, float *row) {
    int64_t taps = mixer->taps;
    for (int64_t c = begin; c < end; c += NAME(BLOCK)) {
        float x[NAME(BLOCK)], y[NAME(BLOCK)] = {0}, beside[NAME(BLOCK)];
        int64_t n = end - c < NAME(BLOCK) ? end - c : NAME(BLOCK);
        NAME(gather_parts)(mixer, call, b, c, n, x);
        if (mixer->before.count) {
            NAME(gather_of)(call, &mixer->before, b, c, n, beside);
            for (int64_t i = 0; i < n; i++) x[i] *= beside[i];
            NAME(round)(x, n);
        }
        T *state = (T *)call->conv_state + (b * mixer->channels + c) * taps;
        const T *weight = (const T *)mixer->conv_weight + c * taps;
        if (taps == 4) NAME(taps)(state, weight, x, n, 4, y);
        else if (taps == 3) NAME(taps)(state, weight, x, n, 3, y);
        else NAME(taps)(state, weight, x, n, taps, y);
        NAME(finish_f32)(y, mixer->conv_bias ? (const T *)mixer->conv_bias + c : NULL, n, y);
        if (mixer->is_silu) {
            NAME(sigmoids)(y, NAME(BLOCK), 1);
            NAME(round)(y, n);
        }
        if (mixer->kind != HFA_MIX_CONV) {
            memcpy(row + c, y, (size_t)n * sizeof(float));
            continue;
        }
        if (mixer->gate.count) {
            NAME(gather_of)(call, &mixer->gate, b, c, n, beside);
            for (int64_t i = 0; i < n; i++) y[i] *= beside[i];
        }
        NAME(store)(y, (T *)call->out + b * mixer->channels + c, n);
    }
}

/* Group `group` of the gated norm of core [heads * value_dim], which holds values of the dtype. */
static void NAME(mix_norm)(const hfa_mixer *mixer, const hfa_mixer_call *call, int64_t b, int64_t group, float *core) {
    int64_t size = mixer->norm_size, width = mixer->heads * mixer->value_dim, from = group * size;
    const T *weight = (const T *)mixer->norm_weight + from % mixer->norm_rows;
    float gate[NAME(BLOCK)] = {0}, w[NAME(BLOCK)], sum = 0.0f;
    T *out = (T *)call->out + b * width + from;
    core += from;
    for (int64_t c = 0; c < size; c += NAME(BLOCK)) {
        int64_t n = size - c < NAME(BLOCK) ? size - c : NAME(BLOCK);
        if (mixer->gates_first) {
            NAME(gather_of)(call, &mixer->gate, b, from + c, n, gate);
            NAME(sigmoids)(gate, NAME(BLOCK), !mixer->gate_is_sigmoid);
            for (int64_t i = 0; i < n; i++) core[c + i] *= gate[i];
        }
        float part = 0.0f; /* short chains of additions err less */
        for (int64_t i = 0; i < n; i++) part += core[c + i] * core[c + i];
        sum += part;
    }
    float inverse = 1.0f / sqrtf(sum / (float)size + (float)mixer->norm_eps);
    for (int64_t c = 0; c < size; c += NAME(BLOCK)) {
        int64_t n = size - c < NAME(BLOCK) ? size - c : NAME(BLOCK);
        for (int64_t i = 0; i < n; i++) core[c + i] *= inverse;
        NAME(load)(weight + c, w, n);
        if (!mixer->rounds_once) NAME(round)(core + c, n);
        for (int64_t i = 0; i < n; i++) core[c + i] *= w[i];
        if (!mixer->gates_first) {
            if (!mixer->rounds_once) NAME(round)(core + c, n);
            NAME(gather_of)(call, &mixer->gate, b, from + c, n, gate);
            NAME(sigmoids)(gate, NAME(BLOCK), !mixer->gate_is_sigmoid);
            for (int64_t i = 0; i < n; i++) core[c + i] *= gate[i];
        }
        NAME(store)(core + c, out + c, n);
    }
}

/* x / sqrt(sum of squares + 1e-6) * scale */
static void NAME(unit)(const float *x, int64_t n, float scale, float *out) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    float inverse = 1.0f / sqrtf(sum + 1e-6f);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * inverse * scale;
}

/* `vectors` vectors of columns of one head's state [keys, stride]: S = decay S; S += k (v - k S) beta; out = q S. The state is read
 * twice, the second time from a near cache. */
HFA_INLINE void NAME(delta_columns)(float *state, int64_t stride, int64_t keys, const float *decay, const float *k, const float *q,
                                    const float *v, float beta, float *out, const int vectors) {
    vf sum[4], add[4];
    UNROLL(4) for (int j = 0; j < vectors; j++) sum[j] = vf_set1(0.0f);
    for (int64_t i = 0; i < keys; i++) {
        vf d = vf_set1(decay[i]), key = vf_set1(k[i]);
        UNROLL(4) for (int j = 0; j < vectors; j++) sum[j] = vf_fma(vf_mul(vf_load(state + i * stride + j * VW), d), key, sum[j]);
    }
    UNROLL(4) for (int j = 0; j < vectors; j++) {
        add[j] = vf_mul(vf_sub(vf_load(v + j * VW), sum[j]), vf_set1(beta));
        sum[j] = vf_set1(0.0f);
    }
    for (int64_t i = 0; i < keys; i++) {
        vf d = vf_set1(decay[i]), key = vf_set1(k[i]), query = vf_set1(q[i]);
        UNROLL(4) for (int j = 0; j < vectors; j++) {
            float *at = state + i * stride + j * VW;
            vf s = vf_fma(key, add[j], vf_mul(vf_load(at), d));
            vf_store(at, s);
            sum[j] = vf_fma(s, query, sum[j]);
        }
    }
    UNROLL(4) for (int j = 0; j < vectors; j++) vf_store(out + j * VW, sum[j]);
}

/* One head of the gated delta rule, and its norm. row [channels]: queries, keys, values after the convolution. */
static void NAME(mix_delta)(const hfa_mixer *mixer, const hfa_mixer_call *call, int64_t b, int64_t head, const float *row, float *core) {
    int64_t keys = mixer->key_dim, values = mixer->value_dim, group = head / (mixer->heads / mixer->groups);
    float q[HFA_MAX_STATE], k[HFA_MAX_STATE], decay[HFA_MAX_STATE];
    const float *v = row + 2 * mixer->groups * keys + head * values;
    NAME(unit)(row + group * keys, keys, 1.0f / sqrtf((float)keys), q);
    NAME(unit)(row + (mixer->groups + group) * keys, keys, 1.0f, k);
    float beta = ROUND1(1.0f / (1.0f + expf(-NAME(gather_one)(call, &mixer->beta, b, head))));
    beta = ROUND1(beta * (float)mixer->beta_scale);
    if (call->decay) {
        const float *logs = call->decay + (b * mixer->heads + head) * keys;
        for (int64_t i = 0; i < keys; i++) decay[i] = expf(logs[i]);
    } else {
        float a, bias;
        NAME(load_as)(mixer->a_log, (int)mixer->a_log_is_f32, head, 1, &a);
        NAME(load_as)(mixer->dt_bias, (int)mixer->dt_bias_is_f32, head, 1, &bias);
        float d = expf(-expf(a) * NAME(softplus)(NAME(gather_one)(call, &mixer->rate, b, head) + bias));
        for (int64_t i = 0; i < keys; i++) decay[i] = d;
    }
    float *state = call->state + (b * mixer->heads + head) * keys * values, *out = core + head * values;
    int64_t c = 0;
    for (; c + 4 * VW <= values; c += 4 * VW) NAME(delta_columns)(state + c, values, keys, decay, k, q, v + c, beta, out + c, 4);
    for (; c + VW <= values; c += VW) NAME(delta_columns)(state + c, values, keys, decay, k, q, v + c, beta, out + c, 1);
    for (; c < values; c++) {
        float sum = 0.0f, result = 0.0f;
        for (int64_t i = 0; i < keys; i++) sum += state[i * values + c] * decay[i] * k[i];
        float add = (v[c] - sum) * beta;
        for (int64_t i = 0; i < keys; i++) {
            state[i * values + c] = state[i * values + c] * decay[i] + k[i] * add;
            result += state[i * values + c] * q[i];
        }
        out[c] = result;
    }
    NAME(round)(out, values);
    NAME(mix_norm)(mixer, call, b, head, core);
}

/* A row of a state of n values: S = S decay + b x, the summand rounded where is_ssd; returns the sum of rounded S c. */
HFA_INLINE float NAME(state_row)(float *state, int64_t n, vf decay, const float *decays, const float *b, float x, const float *c,
                                 int is_ssd) {
    vf sum = vf_set1(0.0f), times = vf_set1(x);
    int64_t i = 0;
    for (; i + VW <= n; i += VW) {
        vf add = vf_mul(vf_load(b + i), times);
        if (is_ssd) add = NAME(rounded)(add);
        vf s = vf_add(vf_mul(vf_load(state + i), decays ? vf_load(decays + i) : decay), add);
        vf_store(state + i, s);
        sum = vf_fma(NAME(rounded)(s), vf_load(c + i), sum);
    }
    float total = vf_sum(sum), one[VW];
    vf_store(one, decay);
    for (; i < n; i++) {
        float add = is_ssd ? ROUND1(b[i] * x) : b[i] * x;
        state[i] = state[i] * (decays ? decays[i] : one[0]) + add;
        total += ROUND1(state[i]) * c[i];
    }
    return total;
}

/* One head of Mamba-2's recurrence. row [channels]: x, B, C after the convolution. */
static void NAME(mix_ssd)(const hfa_mixer *mixer, const hfa_mixer_call *call, int64_t b, int64_t head, const float *row, float *core) {
    int64_t n = mixer->key_dim, width = mixer->value_dim, inner = mixer->heads * width;
    int64_t group = head / (mixer->heads / mixer->groups), first = (b * mixer->heads + head) * width * n;
    const float *x = row + head * width, *rows = row + inner + group * n, *c = rows + mixer->groups * n;
    float a, bias, d, adds[HFA_MAX_STATE], *out = core + head * width;
    NAME(load_as)(mixer->a_log, (int)mixer->a_log_is_f32, head, 1, &a);
    NAME(load_as)(mixer->dt_bias, 0, head, 1, &bias);
    NAME(load_as)(mixer->d, 0, head, 1, &d);
    float dt = ROUND1(NAME(softplus)(ROUND1(NAME(gather_one)(call, &mixer->rate, b, head) + bias)));
    vf decay = vf_set1(expf(dt * -expf(a)));
    for (int64_t i = 0; i < n; i++) adds[i] = dt * rows[i];
    NAME(round)(adds, n);
    for (int64_t p = 0; p < width; p++) {
        float sum = NAME(state_row)(call->state + first + p * n, n, decay, NULL, adds, x[p], c, 1);
        out[p] = ROUND1(ROUND1(sum) + ROUND1(x[p] * d));
    }
    if (mixer->norm_size) return;
    float gate[HFA_MAX_STATE] = {0};
    if (mixer->gate.count) {
        NAME(gather_of)(call, &mixer->gate, b, head * width, width, gate);
        NAME(sigmoids)(gate, (width + VW - 1) / VW * VW, 1);
        NAME(round)(gate, width);
        for (int64_t p = 0; p < width; p++) out[p] *= gate[p];
    }
    NAME(store)(out, (T *)call->out + b * inner + head * width, width);
}

/* Channels begin..end of Mamba's selective scan, up to NAME(BLOCK) of them; parts: x, B, C. */
static void NAME(mix_scan)(const hfa_mixer *mixer, const hfa_mixer_call *call, int64_t b, int64_t begin, int64_t end) {
    int64_t n = mixer->key_dim, count = end - begin, width = mixer->heads;
    float x[NAME(BLOCK)], dt[NAME(BLOCK)] = {0}, bias[NAME(BLOCK)], d[NAME(BLOCK)], gate[NAME(BLOCK)] = {0}, out[NAME(BLOCK)];
    float rows[HFA_MAX_STATE], c[HFA_MAX_STATE], a[HFA_MAX_STATE + VW] = {0};
    vf zero = vf_set1(0.0f);
    NAME(gather_of)(call, &mixer->part[0], b, begin, count, x);
    NAME(gather_of)(call, &mixer->part[1], b, 0, n, rows);
    NAME(gather_of)(call, &mixer->part[2], b, 0, n, c);
    NAME(gather_of)(call, &mixer->rate, b, begin, count, dt);
    NAME(gather_of)(call, &mixer->gate, b, begin, count, gate);
    NAME(load_as)(mixer->dt_bias, 0, begin, count, bias);
    NAME(load_as)(mixer->d, 0, begin, count, d);
    NAME(sigmoids)(gate, NAME(BLOCK), 1);
    NAME(round)(gate, count);
    for (int64_t i = 0; i < count; i++) dt[i] += bias[i];
    NAME(round)(dt, count);
    for (int64_t i = 0; i < NAME(BLOCK); i += VW) vf_store(dt + i, NAME(softplus_of)(vf_load(dt + i)));
    NAME(round)(dt, count);
    for (int64_t i = 0; i < count; i++) {
        float step = dt[i];
        float adds[HFA_MAX_STATE];
        NAME(load_as)(mixer->a_log, (int)mixer->a_log_is_f32, (begin + i) * n, n, a);
        for (int64_t j = 0; j < n; j += VW)
            vf_store(a + j, vf_exp(vf_mul(vf_set1(step), vf_sub(zero, vf_exp(vf_load(a + j))))));
        for (int64_t j = 0; j < n; j++) adds[j] = step * rows[j];
        float sum = NAME(state_row)(call->state + (b * width + begin + i) * n, n, zero, a, adds, x[i], c, 0);
        out[i] = ROUND1(ROUND1(sum) + ROUND1(x[i] * d[i])) * gate[i];
    }
    NAME(store)(out, (T *)call->out + b * width + begin, count);
}

static const hfa_recurrent_kernels NAME(recurrent) = {.conv = NAME(mix_conv), .delta = NAME(mix_delta), .ssd = NAME(mix_ssd),
                                                      .norm = NAME(mix_norm), .scan = NAME(mix_scan)};
