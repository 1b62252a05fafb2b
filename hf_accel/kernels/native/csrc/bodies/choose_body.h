/* What choosing a token asks of whole vocabularies; included once per instruction set. */

#define TWISTER_MIX(U, V) ((((U) & 0x80000000u) | ((V) & 0x7fffffffu)) >> 1 ^ (-((V) & 1u) & 0x9908b0dfu))
/* The next 624 words of MT19937 (Matsumoto, Nishimura 1998), in place: plain loops, of which compilers make vectors. */
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

/* maxima[j] of block j of x [n], n a multiple of `block`, that one of 32; 0 where a value is NaN or +inf, which are no maxima */
static int block_maxima(const float *x, int64_t n, int64_t block, float *maxima) {
    enum { PARTS = 32 / VW };
    vf none = vf_set1(-INFINITY), limit = vf_set1(INFINITY), one = vf_set1(1.0f), wrong[PARTS];
    for (int i = 0; i < PARTS; i++) wrong[i] = vf_set1(0.0f);
    for (int64_t j = 0; j < n / block; j++) {
        vf top[PARTS];
        for (int i = 0; i < PARTS; i++) top[i] = none;
        for (int64_t k = 0; k < block; k += PARTS * VW)
            for (int i = 0; i < PARTS; i++) {
                vf v = vf_load(x + j * block + k + i * VW);
                top[i] = vf_max(v, top[i]);
                wrong[i] = vf_select_lt(v, limit, wrong[i], one);
            }
        for (int i = 1; i < PARTS; i++) top[0] = vf_max(top[0], top[i]);
        maxima[j] = vf_hmax(top[0]);
    }
    for (int i = 1; i < PARTS; i++) wrong[0] = vf_add(wrong[0], wrong[i]);
    return vf_sum(wrong[0]) == 0.0f;
}
