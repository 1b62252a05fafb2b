/* Which instruction sets this machine has, and which one is in use. */
#include <stdatomic.h>
#include "kernels.h"

static atomic_int chosen = -1; /* -1: not asked yet */

#if defined(__x86_64__)
#include <cpuid.h>

/* What the operating system saves on a context switch (XCR0): a register the CPU has is unusable without. */
static uint64_t saved_state(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

static int supported(int isa) {
    uint32_t a, b, c, d, b7, c7, d7, a71 = 0;
    if (isa == HFA_PORTABLE) return 1;
    if (isa == HFA_NEON || isa > HFA_AMX) return 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    int osxsave = (c >> 27) & 1, avx = (c >> 28) & 1, fma = (c >> 12) & 1, f16c = (c >> 29) & 1;
    if (!osxsave || !avx || !fma || !f16c || (saved_state() & 0x6) != 0x6) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) || !((b7 >> 5) & 1)) return 0;
    if (isa == HFA_AVX2) return 1;
    if ((saved_state() & 0xe6) != 0xe6) return 0;
    uint32_t wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    if ((b7 & wanted) != wanted) return 0;
    if (isa == HFA_AVX512) return 1;
    if (a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
    int dots = (a71 >> 5) & 1 && (c7 >> 11) & 1; /* BF16 and VNNI: every CPU with the first has the second */
    if (!dots || isa == HFA_AVX512_BF16) return dots;
#if HFA_HAS_AMX
    wanted = 1u << 22 | 1u << 24 | 1u << 25; /* AMX-BF16, AMX-TILE, AMX-INT8 */
    int gfni = (c7 >> 8) & 1;
    return gfni && (d7 & wanted) == wanted && (saved_state() & 0x60000) == 0x60000 && hfa_amx_permitted();
#else
    return 0;
#endif
}

static const hfa_kernels *table(int isa) {
    switch (isa) {
        case HFA_AVX2: return hfa_kernels_avx2;
        case HFA_AVX512: return hfa_kernels_avx512;
        case HFA_AVX512_BF16: return hfa_kernels_avx512_bf16;
#if HFA_HAS_AMX
        case HFA_AMX: return hfa_kernels_amx();
#endif
        default: return hfa_kernels_portable;
    }
}
#elif defined(__aarch64__)
#if defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>
static int has(const char *name) {
    int is_there = 0;
    size_t size = sizeof is_there;
    return sysctlbyname(name, &is_there, &size, NULL, 0) == 0 && is_there;
}
static int has_dot(void) { return has("hw.optional.arm.FEAT_DotProd"); }
static int has_i8mm_and_bf16(void) { return has("hw.optional.arm.FEAT_I8MM") && has("hw.optional.arm.FEAT_BF16"); }
#elif defined(__linux__)
#include <sys/auxv.h>
static int has_dot(void) { return (getauxval(AT_HWCAP) >> 20) & 1; } /* HWCAP_ASIMDDP; older headers lack the names */
static int has_i8mm_and_bf16(void) { return ((getauxval(AT_HWCAP2) >> 13) & 3) == 3; } /* HWCAP2_I8MM, HWCAP2_BF16 */
#else
static int has_dot(void) { return 0; }
static int has_i8mm_and_bf16(void) { return 0; }
#endif

static int supported(int isa) {
    switch (isa) {
        case HFA_PORTABLE: case HFA_NEON: return 1;
        case HFA_NEON_DOT: return has_dot();
        case HFA_NEON_I8MM: return has_dot() && has_i8mm_and_bf16();
        default: return 0;
    }
}

static const hfa_kernels *table(int isa) {
    switch (isa) {
        case HFA_NEON: return hfa_kernels_neon;
        case HFA_NEON_DOT: return hfa_kernels_neon_dot;
        case HFA_NEON_I8MM: return hfa_kernels_neon_i8mm;
        default: return hfa_kernels_portable;
    }
}
#else
static int supported(int isa) { return isa == HFA_PORTABLE; }
static const hfa_kernels *table(int isa) { (void)isa; return hfa_kernels_portable; }
#endif

int hfa_abi_version(void) { return HFA_ABI_VERSION; }

int hfa_isa_supported(int isa) { return isa >= 0 && isa < HFA_ISAS && supported(isa); }

int hfa_isa(void) {
    int isa = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (isa >= 0) return isa;
    for (isa = HFA_ISAS - 1; isa > HFA_PORTABLE && !supported(isa);) isa--;
    atomic_store_explicit(&chosen, isa, memory_order_relaxed);
    return isa;
}

int hfa_set_isa(int isa) {
    if (!hfa_isa_supported(isa)) return -1;
    atomic_store_explicit(&chosen, isa, memory_order_relaxed);
    return 0;
}

const hfa_kernels *hfa_active_kernels(int dtype) { return table(hfa_isa()) + dtype; }
