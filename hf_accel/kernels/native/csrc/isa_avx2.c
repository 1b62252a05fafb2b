/* Kernels for AVX2, FMA and F16C. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "scalar.h"
#include "vec_avx2.h"
#define TABLE hfa_kernels_avx2
#define ROWS_FOR(M) ((M) <= 2 ? 4 : (M) <= 4 ? 2 : 1) /* 16 vector registers */
#define PANELS_FROM 5 /* four rows are bound by memory: as fast without panels, or faster */
#define PANEL_ROWS_FOR(G) ((G) <= 2 ? 4 : (G) == 3 || (G) == 6 ? 3 : 2)
/* Two rows of W, up to four of x: gcc would load x twice; held in a register: 45 G products a second and core, not 38 */
#define HOLDS(R, M) ((R) == 2 && (M) <= 4)
#define HOLD(x) __asm__("" : "+x"(x))
#include "isa_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
