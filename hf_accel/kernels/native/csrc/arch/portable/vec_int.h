/* Integer products of packed weights in the compiler's own vector extension, four 32-bit lanes: one row of W each. */
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vi_bits __attribute__((vector_size(16)));
typedef vi v4; /* sums of products with few bits: int32 per lane */
HFA_INLINE vi vi_load(const void *p) { vi v; memcpy(&v, p, 16); return v; }
HFA_INLINE vi vi_zero(void) { return (vi){0, 0, 0, 0}; }
HFA_INLINE vi vi_repeat(const void *p) { int32_t x; memcpy(&x, p, 4); return (vi){x, x, x, x}; }
HFA_INLINE vi vi_or(vi a, vi b) { return a | b; }
/* `count` bits of every byte from bit `from` on, moved down to bit `to` on: what comes over from the neighbour is masked away */
HFA_INLINE vi vi_field(vi a, const int from, const int count, const int to) {
    return (vi)((vi_bits)a >> (from - to) & (((1u << count) - 1) << to) * 0x01010101u);
}
HFA_INLINE vi vi_table(const uint8_t *p) { return vi_load(p); }
#ifndef HFA_OWN_LOOKUP
HFA_INLINE vi vi_look(vi table, vi a) {
    uint8_t entries[16], bytes[16];
    memcpy(entries, &table, 16);
    memcpy(bytes, &a, 16);
    for (int i = 0; i < 16; i++) bytes[i] = entries[bytes[i]];
    return vi_load(bytes);
}
#endif
/* what stands in the table for the four bits of every byte from bit `from` on */
HFA_INLINE vi vi_lookup(vi a, const int from, vi table) { return vi_look(table, vi_field(a, from, 4, 0)); }
HFA_INLINE int32_t v4_start(int first, int second) { return first + second; }
HFA_INLINE v4 v4_begin(vi start) { return start; }
#ifndef HFA_OWN_DOT
HFA_INLINE v4 v4_dot(v4 sum, vi w, vi x) { /* bytes of W without, of x with a sign */
    UNROLL(4)
    for (int i = 0; i < 32; i += 8) sum += (vi)((vi_bits)w >> i & 255) * ((vi)((vi_bits)x << (24 - i)) >> 24);
    return sum;
}
HFA_INLINE vf vi_float(vi a) { float f[4]; for (int i = 0; i < 4; i++) f[i] = (float)a[i]; return vf_load(f); }
HFA_INLINE vi vi_load_int8(const void *p) { /* eight, widened to 16 bits */
    const int8_t *b = p;
    int16_t wide[8];
    vi v;
    for (int i = 0; i < 8; i++) wide[i] = b[i];
    memcpy(&v, wide, 16);
    return v;
}
HFA_INLINE vi vi_dot16(vi sum, vi w, vi x) {
    return sum + ((vi)((vi_bits)w << 16) >> 16) * ((vi)((vi_bits)x << 16) >> 16) + (w >> 16) * (x >> 16);
}
#endif
HFA_INLINE vf v4_end(v4 sum) { return vi_float(sum); }
