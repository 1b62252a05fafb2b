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
#include "arch/portable/scalar.h"
#include "arch/x86/vec_avx2.h"
#define TABLE hfa_kernels_avx2
#define ROWS_FOR(M) ((M) <= 2 ? 4 : (M) <= 4 ? 3 : (M) <= 6 ? 2 : 1) /* 16 vector registers */
#define PANELS_FROM 5
#define PANEL_ROWS_FOR(G) ((G) <= 2 ? 4 : (G) == 5 || (G) == 6 ? 2 : 3)
#define PROMPT_VECTORS 3
#define PROMPT_ROWS 4
#include "bodies/isa_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
