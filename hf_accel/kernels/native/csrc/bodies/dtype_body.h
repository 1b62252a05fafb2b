/* Every kernel of one dtype; included with DTYPE 0 (bf16), 1 (fp16), 2 (fp32) by isa_body.h. */
#if DTYPE == 0
#define T uint16_t
#define NAME(x) x##_bf16
#define LOADV vf_load_bf16
#define STOREV vf_store_bf16
#define LOAD1(p) bf16_to_f32(*(p))
#define STORE1(p, f) (*(p) = f32_to_bf16(f))
#define ROUND1(f) bf16_to_f32(f32_to_bf16(f))
#elif DTYPE == 1
#define T uint16_t
#define NAME(x) x##_f16
#define LOADV vf_load_f16
#define STOREV vf_store_f16
#define LOAD1(p) f16_to_f32(*(p))
#define STORE1(p, f) (*(p) = f32_to_f16(f))
#define ROUND1(f) f16_to_f32(f32_to_f16(f))
#else
#define T float
#define NAME(x) x##_f32
#define LOADV vf_load
#define STOREV vf_store
#define LOAD1(p) (*(p))
#define STORE1(p, f) (*(p) = (f))
#define ROUND1(f) (f)
#endif

HFA_INLINE vf NAME(rounded)(vf v) {
#if DTYPE == 2
    return v;
#else
    T t[VW];
    STOREV(t, v);
    return LOADV(t);
#endif
}

static void NAME(load)(const void *x, float *out, int64_t n) {
    const T *p = x;
    int64_t i = 0;
    for (; i + VW <= n; i += VW) vf_store(out + i, LOADV(p + i));
    for (; i < n; i++) out[i] = LOAD1(p + i);
}

static void NAME(store)(const float *x, void *out, int64_t n) {
    T *p = out;
    int64_t i = 0;
    for (; i + VW <= n; i += VW) STOREV(p + i, vf_load(x + i));
    for (; i < n; i++) STORE1(p + i, x[i]);
}

static void NAME(round)(float *x, int64_t n) {
    int64_t i = 0;
    for (; i + VW <= n; i += VW) vf_store(x + i, NAME(rounded)(vf_load(x + i)));
    for (; i < n; i++) x[i] = ROUND1(x[i]);
}

HFA_INLINE void NAME(add_bias)(float *acc, const void *bias, int64_t n) {
    const T *b = bias;
    int64_t i = 0;
    if (!b) return;
    for (; i + VW <= n; i += VW) vf_store(acc + i, vf_add(vf_load(acc + i), LOADV(b + i)));
    for (; i < n; i++) acc[i] += LOAD1(b + i);
}

static void NAME(finish)(float *acc, const void *bias, int64_t n, void *out) {
    NAME(add_bias)(acc, bias, n);
    NAME(store)(acc, out, n);
}

static void NAME(finish_f32)(float *acc, const void *bias, int64_t n, float *out) {
    NAME(add_bias)(acc, bias, n);
    NAME(round)(acc, n);
    memcpy(out, acc, (size_t)n * sizeof(float));
}

HFA_INLINE float NAME(sum_of_squares)(const float *x, int64_t n, float mean) {
    vf s0 = vf_set1(0.0f), s1 = s0, m = vf_set1(mean);
    int64_t i = 0;
    for (; i + 2 * VW <= n; i += 2 * VW) {
        vf a = vf_sub(vf_load(x + i), m), b = vf_sub(vf_load(x + i + VW), m);
        s0 = vf_fma(a, a, s0);
        s1 = vf_fma(b, b, s1);
    }
    float sum = vf_sum(vf_add(s0, s1));
    for (; i < n; i++) sum += (x[i] - mean) * (x[i] - mean);
    return sum;
}

HFA_INLINE float NAME(mean)(const float *x, int64_t n) {
    vf s0 = vf_set1(0.0f), s1 = s0;
    int64_t i = 0;
    for (; i + 2 * VW <= n; i += 2 * VW) {
        s0 = vf_add(s0, vf_load(x + i));
        s1 = vf_add(s1, vf_load(x + i + VW));
    }
    float sum = vf_sum(vf_add(s0, s1));
    for (; i < n; i++) sum += x[i];
    return sum / (float)n;
}

/* Every product as stock rounds it, see enum hfa_norm_kind. */
HFA_INLINE void NAME(norm_of_kind)(const float *x, const T *w, const T *b, int64_t n, float eps, const int64_t kind, float *out) {
    const int is_layer = kind == HFA_LAYER_NORM || kind == HFA_LAYER_NORM_UNIT;
    float mean = is_layer ? NAME(mean)(x, n) : 0.0f;
    float inverse = 1.0f / sqrtf(NAME(sum_of_squares)(x, n, mean) / (float)n + eps);
    vf k = vf_set1(inverse), m = vf_set1(mean), one = vf_set1(1.0f);
    int64_t i = 0;
    for (; i + VW <= n; i += VW) {
        vf v = vf_mul(is_layer ? vf_sub(vf_load(x + i), m) : vf_load(x + i), k);
        if (kind == HFA_RMS) v = NAME(rounded)(v);
        if (w) {
            vf g = LOADV(w + i);
            if (kind == HFA_RMS_UNIT) g = vf_add(one, g);
            if (kind == HFA_LAYER_NORM_UNIT) g = NAME(rounded)(vf_add(one, g));
            v = vf_mul(v, g);
        }
        if (b) v = vf_add(v, LOADV(b + i));
        vf_store(out + i, NAME(rounded)(v));
    }
    for (; i < n; i++) {
        float v = (x[i] - mean) * inverse;
        if (kind == HFA_RMS) v = ROUND1(v);
        if (w) {
            float g = LOAD1(w + i);
            if (kind == HFA_RMS_UNIT) g += 1.0f;
            if (kind == HFA_LAYER_NORM_UNIT) g = ROUND1(1.0f + g);
            v *= g;
        }
        if (b) v += LOAD1(b + i);
        out[i] = ROUND1(v);
    }
}

static void NAME(norm)(const float *x, const hfa_norm *norm, int64_t n, float *out) {
    const T *w = norm->weight, *b = norm->bias;
    float eps = (float)norm->eps;
    switch (norm->kind) {
        case HFA_RMS: NAME(norm_of_kind)(x, w, NULL, n, eps, HFA_RMS, out); break;
        case HFA_RMS_UNIT: NAME(norm_of_kind)(x, w, NULL, n, eps, HFA_RMS_UNIT, out); break;
        case HFA_RMS_ONCE: NAME(norm_of_kind)(x, w, NULL, n, eps, HFA_RMS_ONCE, out); break;
        case HFA_LAYER_NORM: NAME(norm_of_kind)(x, w, b, n, eps, HFA_LAYER_NORM, out); break;
        case HFA_LAYER_NORM_UNIT: NAME(norm_of_kind)(x, w, b, n, eps, HFA_LAYER_NORM_UNIT, out); break;
        default: memmove(out, x, (size_t)n * sizeof(float));
    }
}

static float NAME(activate1)(int activation, float x) {
    switch (activation) {
        case HFA_SILU: return x / (1.0f + expf(-x));
        case HFA_GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
        case HFA_GELU: return x * 0.5f * (1.0f + erff(x * 0.7071067811865476f));
        case HFA_QUICK_GELU: return x * ROUND1(1.0f / (1.0f + expf(-ROUND1(1.702f * x))));
        case HFA_SIGMOID: return 1.0f / (1.0f + expf(-x));
        case HFA_RELU2: return x > 0.0f ? x * x : (x != x ? x : 0.0f);
        default: return x > 0.0f ? x : (x != x ? x : 0.0f);
    }
}

/* out = round(round(activation(gate)) * up) */
static void NAME(gate)(int activation, const float *gate, const float *up, int64_t n, float *out) {
    int64_t i = 0;
    vf one = vf_set1(1.0f), zero = vf_set1(0.0f), half = vf_set1(0.5f);
    for (; i + VW <= n; i += VW) {
        vf x = vf_load(gate + i), a;
        if (activation == HFA_SILU) {
            a = vf_div(x, vf_add(one, vf_exp(vf_sub(zero, x))));
        } else if (activation == HFA_GELU_TANH) {
            vf cube = vf_mul(vf_mul(x, x), x);
            vf u = vf_mul(vf_set1(0.7978845608028654f), vf_fma(vf_set1(0.044715f), cube, x));
            a = vf_mul(vf_mul(half, x), vf_add(one, vf_tanh(u)));
        } else if (activation == HFA_GELU) {
            a = vf_mul(vf_mul(half, x), vf_add(one, vf_erf(vf_mul(x, vf_set1(0.7071067811865476f)))));
        } else if (activation == HFA_QUICK_GELU) {
            vf u = NAME(rounded)(vf_mul(vf_set1(1.702f), x));
            a = vf_mul(x, NAME(rounded)(vf_div(one, vf_add(one, vf_exp(vf_sub(zero, u))))));
        } else if (activation == HFA_SIGMOID) {
            a = vf_div(one, vf_add(one, vf_exp(vf_sub(zero, x))));
        } else {
            a = vf_max(zero, x); /* keeps NaN */
            if (activation == HFA_RELU2) a = vf_mul(a, a);
        }
        a = NAME(rounded)(a);
        vf_store(out + i, up ? NAME(rounded)(vf_mul(a, vf_load(up + i))) : a);
    }
    for (; i < n; i++) {
        float a = ROUND1(NAME(activate1)(activation, gate[i]));
        out[i] = up ? ROUND1(a * up[i]) : a;
    }
}

static void NAME(add)(const float *a, const float *b, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + VW <= n; i += VW) vf_store(out + i, NAME(rounded)(vf_add(vf_load(a + i), vf_load(b + i))));
    for (; i < n; i++) out[i] = ROUND1(a[i] + b[i]);
}

/* round(round(x cos) + round(rotate_half(x) sin)): rotate_half(x) = (-x[half:], x[:half]) */
static void NAME(rotate)(float *x, const float *cosine, const float *sine, int64_t rotary, float *scratch) {
    int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i++) scratch[i] = -x[i + half] * sine[i];
    for (int64_t i = half; i < rotary; i++) scratch[i] = x[i - half] * sine[i];
    for (int64_t i = 0; i < rotary; i++) x[i] *= cosine[i];
    NAME(round)(scratch, rotary);
    NAME(round)(x, rotary);
    NAME(add)(x, scratch, rotary, x);
}

#include "bodies/product_body.h"

typedef T NAME(element);
enum { NAME(STEP) = STEP };
#undef T
#undef NAME
#undef LOADV
#undef STOREV
#undef LOAD1
#undef STORE1
#undef ROUND1
#undef STEP
#undef DTYPE
