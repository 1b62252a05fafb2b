/* Attention of a few queries over one piece of keys and values, whatever they are kept in; shared by block_attention.c and
 * attention.c. */
#ifndef HFA_ATTEND_H
#define HFA_ATTEND_H
#include "kernels.h"

#define HFA_QUERY_GROUP HFA_DOT_ROWS /* queries that go over a piece of K and V together */

typedef struct {
    const hfa_kernels *kernels; /* of the dtype */
    int64_t format, key_dim, value_dim; /* HFA_DENSE: elements of the dtype; else rows of cached.h */
    float scale, softcap;
} hfa_attention;

typedef struct {
    void *queries;  /* HFA_QUERY_GROUP of them, packed for the format */
    float *scores;  /* [HFA_QUERY_GROUP, HFA_PIECE] */
} hfa_attend_room;

size_t hfa_attend_bytes(const hfa_attention *attention);
void hfa_attend_lay_out(const hfa_attention *attention, char *memory, hfa_attend_room *room);
/* Bytes between elements as strides count them: 1 in rows of codes. */
static inline int64_t hfa_attend_element(const hfa_attention *a) { return a->format == HFA_DENSE ? a->kernels->element : 1; }
/* A position of keys or values, x [D] fp32 with values of the dtype; x may be changed. */
void hfa_attend_write(const hfa_attention *attention, float *x, int is_key, void *to);
/* queries [count, D] fp32, may be changed */
void hfa_attend_pack(const hfa_attention *attention, float *queries, int count, const hfa_attend_room *room);
/* room->scores of n <= HFA_PIECE keys, scaled and soft-capped; the caller hides what is not visible (-inf). Returns whether all
 * are finite. */
int hfa_attend_score(const hfa_attention *attention, const void *keys, int64_t stride, int64_t n, int count, const hfa_attend_room *room);
/* Softmax over these n alone: per query its maximum score, the sum of exponentials and [D] values weighted by them. */
void hfa_attend_weigh(const hfa_attention *attention, const void *values, int64_t stride, int64_t n, int count,
                      const hfa_attend_room *room, float *out, float *max, float *sum);
#endif
