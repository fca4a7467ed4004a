/* kernels.h: the function table that every CPU kernel set fills, and the set in force.
 *
 * A set is one struct of functions of the same names.  Arguments were checked by the callers, the codec's functions
 * (codec.cpp) and the verbs; shapes are those of xquant.h.  All sets give the same bytes in the codec.  In attention
 * the scalar set is the exact one (float); the others may round the folded vectors, as their files state.
 *
 * A set's files are compiled for instructions that not every CPU has, so the linker must take nothing from them for
 * anybody else: all they define lies in unnamed namespaces, but for the tables below and the functions attend_*, and no
 * template or inline function of the standard library is called there.  tests/kernels/test_symbols.py looks.
 */
#pragma once

#include "store.h"
#include "xquant.h"

#include <atomic>
#include <cstdint>

namespace xq {

/* One side of one sealed page of one KV head. */
struct sealed_side {
    const xq_side &plan;
    int width;      /* d or e */
    uint8_t *codes; /* its own; or its owner's (plan.owner >= 0), which are only read; null for 0 bits */
    uint8_t *param;
};

/* What the values of a page are by a map, which is taken off before they are sealed: told, or made from the page of the
 * map's source; neither: they are not mapped. */
struct prediction {
    const float *values;       /* [e][XQ_PAGE], as predict_v gives them; or null */
    const sealed_side *source; /* or null */
    const float *weight;       /* [e of the source][e] */
};

/* One KV head over a range of pages, for query rows that share the head: see attention_pages.h. */
struct attention {
    side_view k, v, source;
    int latent;               /* channels of the values, the first, that are the first of K */
    bool mapped;              /* V is what a map of source leaves over */
    const int32_t *page_slot; /* [page_end]: a slot, or an xq_slot */
    int page_begin, page_end;
    int n_rows;                  /* at most XQ_CPU_GROUP_ROWS */
    const float *const *q;       /* [n_rows] -> [d] */
    const uint16_t *const *mask; /* [n_rows] -> F16 [page_end * XQ_PAGE], added to the scores; null: no mask */
    const float *slope;          /* [n_rows] factor of the mask (ALiBi); null: 1 */
    float scale, softcap;
    float *const *states; /* [n_rows] -> [2 w + 2], mapped: [3 w + 2], w = latent + e */
};

struct kernel_set {
    const char *name;
    bool (*supported)(); /* by this CPU and this operating system */

    void (*pack)(int bits, int n_i, int n_j, const uint8_t *codes, uint8_t *packed);
    void (*unpack)(int bits, int n_i, int n_j, const uint8_t *packed, uint8_t *codes);

    /* rows F16 [XQ_PAGE][width], keys F32 that are rounded to F16; stride: elements from token to token.  Sealing
     * returns how many inputs were not finite. */
    int (*seal_k)(const sealed_side &page, const uint16_t *rows, int64_t stride, const uint32_t valid[4]);
    int (*seal_keys)(const sealed_side &page, const float *keys, int64_t stride, const uint32_t valid[4]);
    int (*seal_v)(const sealed_side &page, const uint16_t *rows, int64_t stride, const uint32_t valid[4],
                  const prediction &predicted);
    void (*unseal_k)(const sealed_side &page, uint16_t *rows, int64_t stride);
    void (*unseal_keys)(const sealed_side &page, float *keys, int64_t stride);
    void (*unseal_v)(const sealed_side &page, uint16_t *rows, int64_t stride, const prediction &predicted);
    void (*predict_v)(const sealed_side &source, const float *weight, float *predicted /* [e][XQ_PAGE] */);
    void (*hadamard)(float *x, int n_rows, int n);

    /* F16 rows, or keys as above, to a page in bytes and back; and from there to codes, as from rows. */
    int (*shrink)(const byte_page &page, const uint16_t *rows, int64_t stride, const uint32_t valid[4]);
    int (*shrink_keys)(const byte_page &page, const float *keys, int64_t stride, const uint32_t valid[4]);
    void (*widen)(const byte_page &page, uint16_t *rows, int64_t stride);
    void (*widen_keys)(const byte_page &page, float *keys, int64_t stride);
    int (*seal_k_bytes)(const sealed_side &page, const byte_page &from, const uint32_t valid[4]);
    int (*seal_v_bytes)(const sealed_side &page, const byte_page &from, const uint32_t valid[4],
                        const prediction &predicted);

    /* x [n] to F16 and back, n a multiple of 16.  What is not finite is stored as sealing takes it, and counted. */
    int (*to_half)(const float *x, int n, uint16_t *half);
    void (*to_float)(const uint16_t *half, int n, float *x);

    void (*attend)(const attention &args);

    std::atomic<uint64_t> *calls;
};

extern const kernel_set kernels_scalar;
#if defined(__x86_64__)
extern const kernel_set kernels_avx512, kernels_avxvnni, kernels_avx2;
#elif defined(__aarch64__)
extern const kernel_set kernels_neon_i8mm, kernels_neon_dotprod, kernels_neon;
#endif

/* The set in force, or null when XQUANT_KERNELS names one that cannot run (xq_error() says so). */
const kernel_set *active_kernels();

/* Sets the message that xq_error() returns on this thread; printf-like. Returns status. */
int fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

} // namespace xq
