/* Kernels in plain C: every machine. */
#include <math.h>
#include "kernels.h"
#include "scalar.h"
#include "vec_portable.h"
#include "vec_int.h"
#define TABLE hfa_kernels_portable
#define ROWS_FOR(M) ((M) <= 2 ? 4 : (M) <= 4 ? 2 : 1) /* 16 vector registers */
#include "isa_body.h"
