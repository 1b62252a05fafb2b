/* Kernels for AVX-512 with bf16 and 8-bit dot products. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c")
#endif
#include "arch/portable/scalar.h"
#define HFA_DOT_VNNI
#define HFA_DOT_BF16
#include "arch/x86/vec_avx512.h"
#define TABLE hfa_kernels_avx512_bf16
#define ROWS_FOR(M) ((M) <= 4 ? 4 : 2) /* 32 vector registers */
#define PANELS_FROM 3
#define PANEL_ROWS_FOR(G) ((G) <= 6 ? 4 : 2)
#define PROMPT_VECTORS 2
#define PROMPT_ROWS 8
#include "bodies/isa_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
