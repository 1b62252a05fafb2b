/* Kernels for AArch64 Advanced SIMD with 8-bit dot products (sdot) and matrix products (smmla), and the same of bf16 (bfmmla). */
#if defined(__aarch64__)
#include <arm_neon.h>
#include <math.h>
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,i8mm,bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm+bf16")
#endif
#include "arch/portable/scalar.h"
#define HFA_DOT_INT8
#define HFA_MATRIX_INT8
#define HFA_DOT_BF16
#define HFA_MATRIX_BF16
#include "arch/arm/vec_neon.h"
#include "arch/portable/vec_int.h"
#define TABLE hfa_kernels_neon_i8mm
#define ROWS_FOR(M) ((M) <= 4 || DTYPE == HFA_BF16 ? 4 : 2) /* 32 vector registers; sums of bfmmla are half as many */
#define PROMPT_VECTORS 3
#define PROMPT_ROWS 8
#include "bodies/isa_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
