/* Kernels in plain C: every machine. */
#include <math.h>
#include "kernels.h"
#include "arch/portable/scalar.h"
#include "arch/portable/vec_portable.h"
#include "arch/portable/vec_int.h"
#define TABLE hfa_kernels_portable
#define ROWS_FOR(M) ((M) <= 2 ? 4 : (M) <= 4 ? 2 : 1) /* 16 vector registers */
#define PROMPT_VECTORS 2
#define PROMPT_ROWS 4
#include "bodies/isa_body.h"
