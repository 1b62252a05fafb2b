/* What choosing a token asks of whole vocabularies; included once per instruction set. Plain loops: compilers make vectors of them. */

#define TWISTER_MIX(U, V) ((((U) & 0x80000000u) | ((V) & 0x7fffffffu)) >> 1 ^ (-((V) & 1u) & 0x9908b0dfu))
/* The next 624 words of MT19937 (Matsumoto, Nishimura 1998), in place. */
static void twist(uint32_t *x) {
    enum { N = HFA_TWISTER_WORDS, M = 397 };
    for (int i = 0; i < N - M; i++) x[i] = x[i + M] ^ TWISTER_MIX(x[i], x[i + 1]);
    /* in steps of less than the distance from which a word is taken, so that compilers see them independent */
    for (int from = N - M; from < N - 1;) {
        int to = from + 128 < N - 1 ? from + 128 : N - 1;
        uint32_t fresh[128];
        for (int i = from; i < to; i++) fresh[i - from] = x[i + M - N] ^ TWISTER_MIX(x[i], x[i + 1]);
        for (int i = from; i < to; i++) x[i] = fresh[i - from];
        from = to;
    }
    x[N - 1] = x[M - 1] ^ TWISTER_MIX(x[N - 1], x[0]);
}
#undef TWISTER_MIX

/* maxima[j] of block j of x [n], n a multiple of `block`, that one of 16; 0 where a value is NaN or +inf, which are no maxima */
static int block_maxima(const float *x, int64_t n, int64_t block, float *maxima) {
    int wrong[16] = {0}, any = 0;
    for (int64_t j = 0; j < n / block; j++) {
        float top[16];
        for (int l = 0; l < 16; l++) top[l] = -INFINITY;
        for (const float *p = x + j * block; p < x + (j + 1) * block; p += 16)
            for (int l = 0; l < 16; l++) {
                top[l] = p[l] > top[l] ? p[l] : top[l];
                wrong[l] |= !(p[l] < INFINITY);
            }
        for (int l = 1; l < 16; l++) top[0] = top[l] > top[0] ? top[l] : top[0];
        maxima[j] = top[0];
    }
    for (int l = 0; l < 16; l++) any |= wrong[l];
    return !any;
}
