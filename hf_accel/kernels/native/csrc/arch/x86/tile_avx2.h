/* One step of a tile for AVX2: acc[r][m] += R rows of W times M rows of x, over STEP columns; included per dtype by
 * product_body.h. Every load and addition is written out: compilers reorder them until the sums no longer fit sixteen
 * registers. The order of additions is that of wide_dot: first one half of the columns, then the other. */
#if DTYPE == 0 /* even elements, then odd ones */
#define FIRST(FROM, TO) "vmovdqu " FROM "," TO "\n\tvpslld $16," TO "," TO "\n\t"
#define SECOND(FROM, TO) "vmovdqu " FROM "," TO "\n\tvpand %[high]," TO "," TO "\n\t"
#define SECOND_AT ""
#define SECOND_ELEMENT 0
#elif DTYPE == 1
#define FIRST(FROM, TO) "vcvtph2ps " FROM "," TO "\n\t"
#define SECOND FIRST
#define SECOND_AT "16"
#define SECOND_ELEMENT VW
#else
#define FIRST(FROM, TO) "vmovups " FROM "," TO "\n\t"
#define SECOND FIRST
#define SECOND_AT "32"
#define SECOND_ELEMENT VW
#endif

#define TIMES(X, M)                                                                                                   \
    "vmovups " X "(%[x]),%%ymm15\n\tvfmadd231ps %%ymm15,%%ymm12,%[a" M "]\n\tvfmadd231ps %%ymm15,%%ymm13,%[b" M "]\n\t"    \
    "vfmadd231ps %%ymm15,%%ymm14,%[c" M "]\n\t"
#define ROWS(HALF, AT)                                                                                                \
    HALF(AT "(%[w])", "%%ymm12") HALF(AT "(%[w],%[stride])", "%%ymm13") HALF(AT "(%[w],%[stride],2)", "%%ymm14")

/* Three rows by four: all sixteen registers. x: byte offsets of STEP fp32 values are multiples of 64. */
HFA_INLINE void NAME(tile_step_3x4)(vf acc[4][HFA_PACK_ROWS], const T *w, int64_t stride, const float *x) {
    __asm__ volatile(
        ROWS(FIRST, "") TIMES("0", "0") TIMES("64", "1") TIMES("128", "2") TIMES("192", "3")
        ROWS(SECOND, SECOND_AT) TIMES("32", "0") TIMES("96", "1") TIMES("160", "2") TIMES("224", "3")
        : [a0] "+x"(acc[0][0]), [a1] "+x"(acc[0][1]), [a2] "+x"(acc[0][2]), [a3] "+x"(acc[0][3]),
          [b0] "+x"(acc[1][0]), [b1] "+x"(acc[1][1]), [b2] "+x"(acc[1][2]), [b3] "+x"(acc[1][3]),
          [c0] "+x"(acc[2][0]), [c1] "+x"(acc[2][1]), [c2] "+x"(acc[2][2]), [c3] "+x"(acc[2][3])
        : [w] "r"(w), [stride] "r"(stride * (int64_t)sizeof(T)), [x] "r"(x), [high] "m"(vi_high_halves)
        : "ymm12", "ymm13", "ymm14", "ymm15", "memory");
}

HFA_INLINE void NAME(tile_step)(const int R, const int M, vf acc[4][HFA_PACK_ROWS], const T *w, int64_t stride, const float *x) {
    vf rows[4], one;
    if (R == 3 && M == 4) {
        NAME(tile_step_3x4)(acc, w, stride, x);
        return;
    }
    UNROLL(4)
    for (int r = 0; r < R; r++)
        __asm__ volatile(FIRST("%1", "%0") : "=&x"(rows[r]) : "m"(*(const char(*)[32])(w + r * stride)));
    UNROLL(8)
    for (int m = 0; m < M; m++) {
        __asm__ volatile("vmovups %1,%0" : "=x"(one) : "m"(*(const vf *)(x + m * STEP)));
        UNROLL(4)
        for (int r = 0; r < R; r++) __asm__ volatile("vfmadd231ps %2,%1,%0" : "+x"(acc[r][m]) : "x"(rows[r]), "x"(one));
    }
    UNROLL(4)
    for (int r = 0; r < R; r++)
        __asm__ volatile(SECOND("%1", "%0")
                         : "=&x"(rows[r])
                         : "m"(*(const char(*)[32])(w + r * stride + SECOND_ELEMENT)), [high] "m"(vi_high_halves));
    UNROLL(8)
    for (int m = 0; m < M; m++) {
        __asm__ volatile("vmovups %1,%0" : "=x"(one) : "m"(*(const vf *)(x + m * STEP + VW)));
        UNROLL(4)
        for (int r = 0; r < R; r++) __asm__ volatile("vfmadd231ps %2,%1,%0" : "+x"(acc[r][m]) : "x"(rows[r]), "x"(one));
    }
}
#undef FIRST
#undef SECOND
#undef SECOND_AT
#undef SECOND_ELEMENT
#undef TIMES
#undef ROWS
