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

/* llama: w * round(x * rsqrt(mean x^2 + eps)), gemma: x * rsqrt(...) * (1 + w); every product as stock rounds it. */
static void NAME(rms_norm)(const float *x, const void *weight, int64_t n, float eps, int style, float *out) {
    const T *w = weight;
    vf s0 = vf_set1(0.0f), s1 = s0;
    int64_t i = 0;
    for (; i + 2 * VW <= n; i += 2 * VW) {
        vf a = vf_load(x + i), b = vf_load(x + i + VW);
        s0 = vf_fma(a, a, s0);
        s1 = vf_fma(b, b, s1);
    }
    float sum = vf_sum(vf_add(s0, s1));
    for (; i < n; i++) sum += x[i] * x[i];
    float inverse = 1.0f / sqrtf(sum / (float)n + eps);
    vf k = vf_set1(inverse), one = vf_set1(1.0f);
    for (i = 0; i + VW <= n; i += VW) {
        vf v = vf_mul(vf_load(x + i), k), g = LOADV(w + i);
        v = style == HFA_NORM_GEMMA ? vf_mul(v, vf_add(one, g)) : vf_mul(NAME(rounded)(v), g);
        vf_store(out + i, NAME(rounded)(v));
    }
    for (; i < n; i++) {
        float v = x[i] * inverse, g = LOAD1(w + i);
        v = style == HFA_NORM_GEMMA ? v * (1.0f + g) : ROUND1(v) * g;
        out[i] = ROUND1(v);
    }
}

static float NAME(activate1)(int activation, float x) {
    switch (activation) {
        case HFA_SILU: return x / (1.0f + expf(-x));
        case HFA_GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
        case HFA_GELU: return x * 0.5f * (1.0f + erff(x * 0.7071067811865476f));
        default: return x > 0.0f ? x : (x != x ? x : 0.0f);
    }
}

/* out = round(round(activation(gate)) * up) */
static void NAME(gate)(int activation, float *gate, const float *up, int64_t n, float *out) {
    int64_t i = 0;
    vf one = vf_set1(1.0f), zero = vf_set1(0.0f), half = vf_set1(0.5f);
    if (activation != HFA_GELU)
        for (; i + VW <= n; i += VW) {
            vf x = vf_load(gate + i), a;
            if (activation == HFA_SILU) {
                a = vf_div(x, vf_add(one, vf_exp(vf_sub(zero, x))));
            } else if (activation == HFA_GELU_TANH) {
                vf cube = vf_mul(vf_mul(x, x), x);
                vf u = vf_mul(vf_set1(0.7978845608028654f), vf_fma(vf_set1(0.044715f), cube, x));
                a = vf_mul(vf_mul(half, x), vf_add(one, vf_tanh(u)));
            } else {
                a = vf_max(zero, x); /* keeps NaN */
            }
            vf_store(out + i, NAME(rounded)(vf_mul(NAME(rounded)(a), vf_load(up + i))));
        }
    for (; i < n; i++) {
        float a = ROUND1(NAME(activate1)(activation, gate[i]));
        out[i] = ROUND1(a * up[i]);
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
#include "bodies/recurrent_body.h"

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
