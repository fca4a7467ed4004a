/* xquant_cuda.h: the C ABI of the CUDA kernels.
 *
 * Same pages, blocks, codes and parameters as xquant.h, byte for byte; every pointer to data is a device pointer.  All
 * calls enqueue work on the given CUDA stream and return at once; none allocates memory or waits.  Launches depend on
 * shapes alone, never on which page lies where, so that they can be captured in a CUDA graph.
 *
 * Layer storage, per stream:   blocks  [KV head][page][block of xq_block_layout]
 *                              window  F16  K [KV head][slot][XQ_PAGE][d], then V [KV head][slot][XQ_PAGE][e]
 */
#ifndef XQUANT_CUDA_H
#define XQUANT_CUDA_H

#include "xquant.h"

#define XQ_CUDA_PART_PAGES 1024

#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin */

/* One layer: its storage and how to read it. */
typedef struct xq_cuda_layer {
    int32_t d, e; /* head widths of K and V */
    int32_t n_head_kv, n_pages, n_slots;
    xq_layer plan;
    xq_block_layout own, k_owner, v_owner; /* the owners' layouts are `own` for own codes */
    uint8_t *blocks;
    uint8_t *k_blocks, *v_blocks; /* blocks of the layers whose codes are read */
    uint16_t *window;
    int64_t blocks_stream, k_stream, v_stream, window_stream; /* bytes from stream to stream */
    int32_t mapped;                                           /* 1: V is what a map of `source` leaves over */
    xq_side source;
    xq_block_layout source_layout;
    const uint8_t *source_blocks;
    int64_t source_stream;
    const int32_t *map_heads; /* [KV head] of the source */
    const float *map;         /* [KV head][e of the source][e] */
} xq_cuda_layer;

/* What one micro-batch does to a layer before attention reads it: seals, then unseals, then new rows. */
typedef struct xq_cuda_update_args {
    const int32_t *n_seal, *n_unseal; /* [1] each */
    const int32_t *seals;             /* [n_seal][7]: stream, page, slot, valid[4] */
    const int32_t *unseals;           /* [n_unseal][3]: stream, page, slot */
    const int32_t *rows;              /* [n_tokens]: row of the window over streams */
    const float *k_cur, *v_cur;       /* [token][KV head][d or e] */
    int64_t k_head_stride, k_token_stride, v_head_stride, v_token_stride; /* bytes */
    int32_t n_tokens;
    unsigned long long *n_nonfinite; /* [1]: grows by the number of values that were not finite */
} xq_cuda_update_args;

typedef struct xq_cuda_attend_args {
    const float *q;                                /* [stream][token][head][d] */
    int64_t q_head_stride, q_token_stride;         /* bytes */
    const uint16_t *mask;                          /* F16 [stream][token][n_kv_pages * XQ_PAGE] */
    int64_t mask_token_stride, mask_stream_stride; /* bytes */
    const int32_t *table;                /* [stream of the cache][layer.n_pages]: slot, -1 sealed, -2 no cells */
    const int32_t *first_stream;         /* [1]: stream of the cache that stream 0 of q is; null: 0 */
    int32_t n_head, n_tokens, n_streams; /* n_tokens: of each stream */
    int32_t n_kv_pages;                  /* pages that are looked at */
    float scale, softcap, max_bias;      /* as xq_attention; max_bias > 0: ALiBi */
    const float *sinks;                  /* [head] scores that take part in the sum, or null */
    int32_t n_parts;                     /* blocks that share the pages of a KV head, at most XQ_CUDA_PART_PAGES each */
    /* [1] each, or null: counts of the update that was launched just before on the stream.  Given, attention overtakes
     * it as far as its operations allow; all else that it reads must then have been written before it. */
    const int32_t *n_seal, *n_unseal;
    float *partial;     /* room for [part][stream][token][head][2 e + 2, mapped: 3 e + 2] */
    uint32_t *arrivals; /* [stream][(rows of a KV head + 7) / 8][KV head]: 0, and 0 again afterwards */
    float *out;         /* [stream][token][head][e] */
} xq_cuda_attend_args;

/* Pages as F16 rows again, for attention over many query rows at once. */
typedef struct xq_cuda_unpack_args {
    const int32_t *table, *first_stream; /* as above */
    int32_t n_streams, n_kv_pages;
    int32_t is_k, first_head, n_heads; /* KV heads that are wanted */
    uint16_t *rows;                    /* F16 [stream][n_kv_pages * XQ_PAGE][n_heads][d or e]; pages without cells: 0 */
} xq_cuda_unpack_args;

/* Keys of a few pages as F32 and back, for a context shift between the two. */
typedef struct xq_cuda_shift_args {
    const int32_t *pages;              /* [n_pages][7]: stream, page, slot or -1 (sealed), valid[4] as for seals */
    float *keys;                       /* F32 [page][token of the page][KV head][d] */
    int64_t head_stride, token_stride; /* bytes */
    int32_t n_pages;
} xq_cuda_shift_args;

/* Status: XQ_OK, XQ_ERR_ARGUMENT, or XQ_ERR_KERNELS if CUDA refuses; xq_cuda_error() says why. */
XQ_API const char *xq_cuda_error(void);
XQ_API int xq_cuda_update(const xq_cuda_layer *layer, const xq_cuda_update_args *args, void *stream);
XQ_API int xq_cuda_attend(const xq_cuda_layer *layer, const xq_cuda_attend_args *args, void *stream);
/* Which kernel xq_cuda_attend takes: "decode" (tensor cores) or "general". */
XQ_API const char *xq_cuda_attend_kernel(const xq_cuda_layer *layer);
XQ_API int xq_cuda_unpack(const xq_cuda_layer *layer, const xq_cuda_unpack_args *args, void *stream);
/* Keys as they are stored, sealed or open; and stored again, sealed or open. */
XQ_API int xq_cuda_read_keys(const xq_cuda_layer *layer, const xq_cuda_shift_args *args, void *stream);
XQ_API int xq_cuda_write_keys(const xq_cuda_layer *layer, const xq_cuda_shift_args *args, void *stream);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif /* XQUANT_CUDA_H */
