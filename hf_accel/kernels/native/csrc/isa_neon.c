/* Kernels for AArch64 Advanced SIMD. Compiled for it with clang without warnings, not yet run on such a machine. */
#if defined(__aarch64__)
#include <arm_neon.h>
#include <math.h>
#include "kernels.h"
#include "scalar.h"
#include "vec_neon.h"
#include "vec_int.h"
#define TABLE hfa_kernels_neon
#define ROWS_FOR(M) ((M) <= 4 ? 4 : 2) /* 32 vector registers */
#include "isa_body.h"
#endif
