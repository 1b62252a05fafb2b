/* Scalar conversions between fp32 and the 16-bit storage types, round to nearest even, NaN kept quiet. */
#ifndef HFA_SCALAR_H
#define HFA_SCALAR_H
#include <stdint.h>
#include <string.h>

/* Complete unrolling of small loops with constant bounds, so that arrays of vectors become registers. */
#define HFA_PRAGMA(text) _Pragma(#text)
#define UNROLL(n) HFA_PRAGMA(GCC unroll n)
#define HFA_INLINE static inline __attribute__((always_inline, unused))

HFA_INLINE uint32_t hfa_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
HFA_INLINE float hfa_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }

HFA_INLINE float bf16_to_f32(uint16_t h) { return hfa_float((uint32_t)h << 16); }

HFA_INLINE uint16_t f32_to_bf16(float f) {
    uint32_t u = hfa_bits(f);
    if (f != f) return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

HFA_INLINE float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
    if (exponent == 31) return hfa_float(sign | 0x7f800000u | (mantissa << 13));
    if (exponent) return hfa_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
    return hfa_float(sign | hfa_bits((float)mantissa * 0x1p-24f)); /* zero and subnormals */
}

HFA_INLINE uint16_t f32_to_f16(float f) {
    uint32_t u = hfa_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
    if (a < 0x38800000u) /* subnormal: the ulp of 0.5f is 2^-24, so this addition does the rounding */
        return (uint16_t)(sign | (hfa_bits(hfa_float(a) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13));
}
#endif
