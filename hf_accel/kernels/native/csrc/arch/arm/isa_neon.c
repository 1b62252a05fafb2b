/* Kernels for AArch64 Advanced SIMD, which every such machine has. */
#if defined(__aarch64__)
#include <arm_neon.h>
#include <math.h>
#include "kernels.h"
#include "arch/portable/scalar.h"
#include "arch/arm/vec_neon.h"
#include "arch/portable/vec_int.h"
#define TABLE hfa_kernels_neon
#define ROWS_FOR(M) ((M) <= 4 ? 4 : 2) /* 32 vector registers */
#define PROMPT_VECTORS 3
#define PROMPT_ROWS 8
#include "bodies/isa_body.h"
#endif
