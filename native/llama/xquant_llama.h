/* xquant_llama.h: what libllama, built by us, exports beside llama.h.
 *
 * A context has an XQuant cache when it was created with type_k = type_v = GGML_TYPE_XQUANT.  Which plan the cache
 * follows is decided then: that of a provider (xquant_llama_set_plan_provider), a preset that kv_overrides of the
 * model's load name, the plan in the model's GGUF file (xquant-metadata.h), or the default preset.  kv_overrides:
 *
 *     xquant.preset   string   name of a preset, instead of the model's plan
 *     xquant.window     integer  newest tokens that stay open; negative: never seal
 *     xquant.pinned     integer  first pages of a sequence that stay open
 *     xquant.open_bits  integer  8 or 16, of open pages that are not being written
 */
#ifndef XQUANT_LLAMA_H
#define XQUANT_LLAMA_H

#include "xquant.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin */

struct ggml_tensor;
struct llama_context;
struct llama_model;

typedef struct xquant_llama_info {
    int64_t bytes_allocated; /* blocks, open pages and page tables of the XQuant layers */
    int64_t bytes_used;      /* of these, what holds tokens now */
    int64_t bytes_other;     /* F16 cache of the sliding-window layers, which XQuant leaves alone */
    int64_t n_nonfinite;     /* not-a-number or infinite keys and values seen while sealing */
    int32_t pages_open, pages_sealed, pages_free;
    int32_t pages_bytes;      /* of those that are open, in bytes; the others are F16 rows */
    int32_t page_tokens;      /* tokens of a page */
    int32_t n_slots, n_bytes; /* open pages that a stream has room for, as rows and as bytes */
    int32_t n_streams;
    int32_t n_layers; /* layers of the model */
    int32_t window, pinned, open_bits;
    double expected_kld; /* what calibration measured; negative: nothing */
} xquant_llama_info;

/* Which build of llama.cpp's CPU kernels runs in this process, by the instructions that it was made for: "amx",
 * "avx512", "avxvnni", "avx2", "sse42"; "neon-i8mm", "neon-dotprod", "neon"; "built-in" where options of the build
 * chose them. Null: none can, and *problem says why. */
XQ_API const char *xquant_llama_cpu_variant(const char **problem);
/* 0, or -1 if the context has no XQuant cache. */
XQ_API int xquant_llama_get_info(const struct llama_context *ctx, xquant_llama_info *info);
/* The plan in force by model layer, and the head widths and KV heads of every layer ([XQ_MAX_LAYERS] each; d = 0: the
 * layer is not in the XQuant cache; e = 0: it is a latent layer).  0, or -1 if the context has no XQuant cache. */
XQ_API int xquant_llama_get_plan(const struct llama_context *ctx, xq_plan *plan, int32_t *d, int32_t *e,
                                 int32_t *n_head_kv);
/* Head widths and KV heads of every model layer with keys and values ([XQ_MAX_LAYERS] each; 0: none; e = 0: latent),
 * and the bytes of the context's cache, of any type.  The number of model layers, or -1. */
XQ_API int xquant_llama_get_shapes(const struct llama_context *ctx, int32_t *d, int32_t *e, int32_t *n_head_kv,
                                   int64_t *bytes);
/* Bytes of the buffers in which a context computes, the largest micro-batch's, whatever its cache; -1: no context. */
XQ_API int64_t xquant_llama_get_compute_bytes(const struct llama_context *ctx);
/* F16 rows [n_cells][width] of the keys or values of a model layer's KV head: the first n_cells cells, which must all
 * be rows (a cache that never seals).  0, or -1 if there is no such head or a page is not in rows. */
XQ_API int xquant_llama_read_rows(struct llama_context *ctx, int32_t layer, int32_t is_value, int32_t head,
                                  int32_t n_cells, uint16_t *rows);
/* The way back: replaces them. */
XQ_API int xquant_llama_write_rows(struct llama_context *ctx, int32_t layer, int32_t is_value, int32_t head,
                                   int32_t n_cells, const uint16_t *rows);
/* Second moments of queries, summed over tokens and the query heads of a KV head: sums [KV head][d][d] by model layer,
 * null where nobody asks. */
typedef struct xquant_llama_moments {
    double *sums[XQ_MAX_LAYERS];
} xquant_llama_moments;
/* The cb_eval of a context whose queries are to be added up, in the coordinates in which attention reads them; moments:
 * its cb_eval_user_data.  Layers on the CPU alone. */
XQ_API bool xquant_llama_add_moments(struct ggml_tensor *node, bool ask, void *moments);
/* A page of a cache: its slot, or an xq_slot; cells in it; tokens written since its newest one. */
typedef struct xquant_llama_page {
    int32_t state, n_cells;
    uint64_t age;
} xquant_llama_page;

/* The first n pages of a stream.  How many there are; -1 if the context has no XQuant cache, or no such stream. */
XQ_API int32_t xquant_llama_get_pages(const struct llama_context *ctx, int32_t stream, int32_t n,
                                      xquant_llama_page *pages);

/* Gives the plan of a cache that is about to be made.  d, e, n_head_kv [n_layers]: head widths and KV heads of every
 * model layer, 0 where the cache does not hold it.  1: the GGUF block (xquant-metadata.h) in *block, of *size bytes,
 * which must stay as it is until the context is made.  0: no plan.  Negative: the context cannot be created. */
typedef int32_t (*xquant_llama_plan_fn)(void *data, int32_t n_layers, const int32_t *d, const int32_t *e,
                                        const int32_t *n_head_kv, const void **block, size_t *size);
/* Asked for the plan of every XQuant cache that is made on this thread from now on; null: nobody is asked. */
XQ_API void xquant_llama_set_plan_provider(xquant_llama_plan_fn function, void *data);
/* Why the last context with an XQuant cache could not be created on this thread; "" if it could. */
XQ_API const char *xquant_llama_error(void);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif /* XQUANT_LLAMA_H */
