/* xquant.h: the whole C ABI of libxquant.
 *
 * Quantizer (XQuant, arXiv 2510.11236, section 3).  A group of values x becomes B-bit codes and two numbers:
 *
 *     x^ = zero + scale * code = centre + scale * (code - (2^B - 1) / 2)         code in 0 .. 2^B - 1
 *
 * Keys are grouped per channel over tokens, values per token over channels.
 *
 * A page is XQ_PAGE consecutive cells of one layer and one KV head.  Open pages hold F16 rows [token][channel].
 * A sealed page is one block of bytes, four parts, each starting on a multiple of 64 bytes:
 *
 *     K codes | K parameters | V codes | V parameters
 *
 * Codes are a matrix c[i][j] (K: i = channel, j = token of the page.  V: i = token of the page, j = channel of the
 * head), so that attention is one primitive for both sides, y[j] += a[i] * c[i][j].  They are stored as
 *
 *     [j / 16][unit of i][64 bytes]
 *
 * where a unit holds 16 j by I = 32 / B consecutive i (B = 1, 2, 4):  the code of (i, j) lies in byte
 * 4 * (j % 16) + i % 4, at bit B * ((i % I) / 4).  3 bits are a 2-bit part (the low bits) followed, within the same
 * j / 16, by a 1-bit part (the high bit).  Rows i past the end of the matrix are code 0.
 *
 * Parameters, n = number of values that share them along the other axis (K: D channels, V: XQ_PAGE tokens):
 *
 *     K: [XQ_PAGE / group tiles][2][n]      V: [E / group groups][2][n]
 *     XQ_PARAM_F16:  scale F16, then zero F16.  0 bits: zero alone ([1][n]), the mean of the group
 *     XQ_PARAM_LOG8: scale = 2^((e - 161) / 8) with e u8 in 1..255, then centre = q * scale / 8 with q i8
 *
 * A page in bytes lies between the two: a page that stays open and is not being written.  Keys and values are as in F16
 * rows, [token] [channel], not rotated, a byte each, and likewise one block for each KV head, whose parts start on
 * multiples of 64:
 *
 *     K bytes i8 [XQ_PAGE][D] | K parameters F16 [2][D] | V bytes i8 [XQ_PAGE][E] | V parameters F16 [2][XQ_PAGE]
 *
 *     x^ = centre + scale * byte     byte in -127 .. 127;  parameters: scales, then centres, K of channels, V of tokens
 *
 * A layer that borrows codes has no codes part; it reads the codes of its owner with its own parameters.
 *
 * A layer whose values are mapped stores what a linear map of an earlier layer's values leaves over.  With x the values
 * of a token in the space they are stored in (rotated or not) and u^ what the source layer stores of one KV head,
 *
 *     x_j ~ sum_i u^_i W[i][j] + x^_j               sum_t p_t x_tj ~ sum_i (sum_t p_t u^_ti) W[i][j] + sum_t p_t x^_tj
 *
 * so that reading takes one more pass over the source's codes and one small product for each row of the query.
 *
 * The first channels of a layer's values may be the first of its keys: all of them in latent attention (MLA), which
 * stores one row a token.  E counts what is stored of V: the others, 0 where there are none.  Reading them takes one
 * more pass over the codes of the keys, the other way round:
 *
 *     out_i = zero_i sum_t p_t + scale_i sum_t p_t c[i][t]            zero and scale: of the tile of tokens
 *
 * The part between the two cdef marks is what the Python binding reads: plain declarations only.
 */
#ifndef XQUANT_H
#define XQUANT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define XQ_API __attribute__((visibility("default")))

#define XQ_PAGE 128         /* tokens of a page */
#define XQ_MAX_HEAD_DIM 576 /* D and E: multiples of 16 up to this */

/* cdef: begin */

enum xq_status {
    XQ_OK = 0,
    XQ_ERR_ARGUMENT = -1, /* a shape, pointer or option is out of range */
    XQ_ERR_KERNELS = -2,  /* the kernel set is unknown, or this CPU or operating system lacks it */
    XQ_ERR_PLAN = -3,     /* a plan is not valid; xq_error() says what is allowed */
};

enum xq_fit {
    XQ_FIT_PAPER = 0,  /* codes from min and max; scale and zero then relaxed by eta (paper, section 3.2) */
    XQ_FIT_MINMAX = 1, /* range shrunk by eta, parameters rounded, then codes */
    XQ_FIT_CLIP = 2,   /* the best of several shrink ratios by squared error, made longer, then as MINMAX */
    XQ_FIT_LLOYD = 3,  /* MINMAX, then three steps of assignment and least squares, made longer (codec_fit.h) */
    XQ_FIT_LSQ = 4,    /* borrowed codes only: least-squares scale and zero for the owner's codes */
};

enum xq_param {
    XQ_PARAM_F16 = 0,
    XQ_PARAM_LOG8 = 1,
};

/* What one layer stores of one side (keys or values). */
typedef struct xq_side {
    int32_t bits;   /* 0..4; 0 keeps the mean of each group */
    int32_t group;  /* K: tokens, 32, 64 or 128.  V: channels, 32, 64, 128 or 0 for the whole head */
    int32_t fit;    /* enum xq_fit */
    int32_t param;  /* enum xq_param */
    int32_t rotate; /* V: 1 multiplies by a normalised Hadamard matrix before quantization.  K: 1 says that the caller
                       has done so with keys and queries; nothing here depends on it */
    int32_t owner;  /* layer whose codes are read, or -1 for own codes */
    int32_t source; /* V only: layer from whose stored values these are predicted, or -1; the map is given apart */
    float eta;      /* [0, 0.5) */
} xq_side;

typedef struct xq_layer {
    xq_side k, v;
} xq_layer;

enum { XQ_MAX_LAYERS = 1024 };

/* What a whole cache stores. window < 0: never seal. */
typedef struct xq_plan {
    int32_t n_layers;
    int32_t window;    /* newest tokens that stay open */
    int32_t pinned;    /* first pages of a stream that stay open */
    int32_t open_bits; /* of open pages that are not being written: 16 (F16) or 8 (bytes) */
    xq_layer layers[XQ_MAX_LAYERS];
} xq_plan;

/* Where the parts of a sealed block start, for one layer of head widths D and E. */
typedef struct xq_block_layout {
    int32_t k_codes, k_param, v_codes, v_param; /* byte offsets; -1 where the part is absent */
    int32_t bytes;                              /* of the whole block, a multiple of 64 */
} xq_block_layout;

/* ---- plan ---- */

/* The message of the last failed call on this thread. */
XQ_API const char *xq_error(void);

/* Fills plan with the named preset for n_layers layers. */
XQ_API int xq_plan_preset(const char *name, int32_t n_layers, xq_plan *plan);
/* Names, separated by commas: of the presets, and of the values of enum xq_fit and of enum xq_param, in their order. */
XQ_API const char *xq_plan_preset_names(void);
XQ_API const char *xq_fit_names(void);
XQ_API const char *xq_param_names(void);
/* Checks every field, and head widths d[n_layers] and e[n_layers]; d and e may be null.
 * A layer with d = 0 is not part of the cache: nothing is checked and nobody may borrow from it.  e = 0: nothing is
 * stored of V, of which likewise. */
XQ_API int xq_plan_check(const xq_plan *plan, const int32_t *d, const int32_t *e);
/* Checks one side on its own for a head width; which layer owns its codes is not looked at. */
XQ_API int xq_check_side(const xq_side *side, int32_t is_k, int32_t width);
XQ_API int xq_block_layout_of(const xq_layer *layer, int32_t d, int32_t e, xq_block_layout *layout);
/* Open pages that a stream of n_pages pages has room for, with n_seq sequences in it, as F16 rows and as bytes: n_seq
 * and n_seq * w, or, with open_bits 16, n_seq * (w + 1) and none; w = pinned + ceil(window / XQ_PAGE).  What sequences
 * beyond the first add is at most a sixth of all pages of each kind.  Where w + 1 pages are all, all are rows. */
XQ_API int32_t xq_plan_slots(const xq_plan *plan, int32_t n_pages, int32_t n_seq);
XQ_API int32_t xq_plan_byte_slots(const xq_plan *plan, int32_t n_pages, int32_t n_seq);
/* So many of a stream's pages, the first ones, are never sealed: where a sequence begins as a rule, and its first pages
 * stay open.  They have no blocks.  0 where they cannot be kept out of the way of pages that are written. */
XQ_API int32_t xq_plan_first_block(const xq_plan *plan, int32_t n_pages);
/* Bytes of the blocks and rows of one stream: of layers l of widths d[l] and e[l] with n_head_kv[l] KV heads; d[l] = 0:
 * not part of the cache.  A cache whose pages all have slots has no blocks. */
XQ_API int64_t xq_cache_bytes(const xq_plan *plan, const int32_t *d, const int32_t *e, const int32_t *n_head_kv,
                              int32_t n_pages, int32_t n_slots, int32_t n_bytes);

/* ---- kernel sets ---- */

/* Names of the kernel sets that this CPU and operating system can run, best first, separated by commas. */
XQ_API const char *xq_kernels_available(void);
/* The set in force.  Chosen once: the best one, or XQUANT_KERNELS.  null: XQUANT_KERNELS names one that cannot run. */
XQ_API const char *xq_kernels(void);
/* Forces a set for this process. */
XQ_API int xq_kernels_force(const char *name);
/* How often kernels of the named set were called in this process, so that a test can prove which one ran. */
XQ_API uint64_t xq_kernels_calls(const char *name);

/* ---- codec ---- */

/* codes [n_i][n_j], one per byte, to the unit order above and back.  packed: xq_packed_bytes(bits, n_i, n_j). */
XQ_API int64_t xq_packed_bytes(int32_t bits, int32_t n_i, int32_t n_j);
XQ_API int xq_pack(int32_t bits, int32_t n_i, int32_t n_j, const uint8_t *codes, uint8_t *packed);
XQ_API int xq_unpack(int32_t bits, int32_t n_i, int32_t n_j, const uint8_t *packed, uint8_t *codes);

/* Seals one side of one page.  rows: F16 [XQ_PAGE][d], distance stride elements.  valid: bit t = token t counts;
 * tokens that do not are given the value of the first one that does.  codes, param: the parts of the block.
 * owner_codes: the owner's codes part if side->owner >= 0 (codes is then not written), else null.
 * predicted: F32 [e][XQ_PAGE] from xq_predict_v, which is taken off before codes are made; null: nothing is.
 * Not-a-numbers count as 0 and infinities as +-65504.  Returns how many such inputs there were, or a negative status.
 */
XQ_API int xq_seal_k(const xq_side *side, int32_t d, const uint16_t *rows, int64_t stride, const uint32_t valid[4],
                     uint8_t *codes, uint8_t *param, const uint8_t *owner_codes, int32_t owner_bits);
XQ_API int xq_seal_v(const xq_side *side, int32_t e, const uint16_t *rows, int64_t stride, const uint32_t valid[4],
                     uint8_t *codes, uint8_t *param, const uint8_t *owner_codes, int32_t owner_bits,
                     const float *predicted);
/* The way back, rounded to F16.  codes: own or the owner's, of the given bits.  predicted: as it was when sealed. */
XQ_API int xq_unseal_k(const xq_side *side, int32_t d, const uint8_t *codes, int32_t code_bits, const uint8_t *param,
                       uint16_t *rows, int64_t stride);
XQ_API int xq_unseal_v(const xq_side *side, int32_t e, const uint8_t *codes, int32_t code_bits, const uint8_t *param,
                       uint16_t *rows, int64_t stride, const float *predicted);
/* What a map makes of a sealed page of its source.  source: with own codes; weight: [e of the source][e];
 * predicted: [e][XQ_PAGE], finite as values are that are sealed. */
XQ_API int xq_predict_v(const xq_side *source, int32_t e, const uint8_t *codes, const uint8_t *param,
                        const float *weight, float *predicted);
/* Takes the tokens of a sealed block that are not valid out of it: their codes, and parameters that no other token
 * needs.
 */
XQ_API int xq_clear_tokens(const xq_layer *layer, int32_t d, int32_t e, const uint32_t valid[4], uint8_t *block);
/* Of the block of a page in bytes: how long it is; takes tokens out, as above; XQ_OK if it may be one: parameters are
 * finite, scales not negative, and no byte is -128. */
XQ_API int64_t xq_byte_block_bytes(int32_t d, int32_t e);
XQ_API int xq_clear_bytes(int32_t d, int32_t e, const uint32_t valid[4], uint8_t *block);
XQ_API int xq_check_bytes(int32_t d, int32_t e, const uint8_t *block);
/* x [n_rows][n] *= normalised Hadamard matrix, in blocks of the largest power of two that divides n.  Its own inverse.
 */
XQ_API int xq_hadamard(float *x, int32_t n_rows, int32_t n);

/* ---- storage ---- */

/* Where a page of a cache lies: an entry of a page table is a slot of F16 rows, or one of these. */
enum xq_slot {
    XQ_SLOT_SEALED = -1, /* in codes */
    XQ_SLOT_NONE = -2,   /* nowhere: it has no cells */
    XQ_SLOT_BYTES = -3,  /* in bytes, in byte slot 0; in byte slot n: XQ_SLOT_BYTES - n */
};

enum xq_limit {
    XQ_MOVE_WORDS = 9,         /* int32 of a move: stream, page, slot, refill, valid[4], small */
    XQ_CPU_GROUP_ROWS = 64,    /* query rows of a KV head that share one pass over the pages */
    XQ_CUDA_GROUP_ROWS = 8,    /* likewise */
    XQ_CUDA_WIDE_ROWS = 16,    /* likewise, of the wide kernel, if there are more than 8 */
    XQ_CUDA_PART_PAGES = 1024, /* pages that a part of attention may have */
};

/* One side of a layer: where its pages lie, of every stream and KV head.  Bytes of page p of KV head h of stream s:
 *
 *     codes + s * codes_stream + h * codes_head + p * codes_page       its own, or those of the layer it borrows from
 *     param + s * param_stream + h * param_head + p * param_page
 *
 * where p is at least the store's first_block (what would be before it is somebody else's), and of F16 rows
 * [XQ_PAGE][width] of the open page in slot n:
 *
 *     rows + s * rows_stream + h * rows_head + n * XQ_PAGE * width
 *
 * Slots from first_staged on lie in the stage, memory that all layers use in turn while a micro-batch is computed; its
 * slots belong to no stream:
 *
 *     stage + h * stage_head + (n - first_staged) * XQ_PAGE * width
 *
 * and of the bytes of the page in byte slot n, parameters behind them:
 *
 *     bytes + s * bytes_stream + h * bytes_head + n * bytes_slot
 */
typedef struct xq_side_store {
    xq_side plan;
    int32_t width;                                /* d or e */
    uint8_t *codes, *param;                       /* null where absent */
    int64_t codes_page, codes_head, codes_stream; /* bytes */
    int64_t param_page, param_head, param_stream; /* bytes */
    uint16_t *rows;
    int64_t rows_head, rows_stream;               /* elements */
    uint16_t *stage;                              /* null: there is none */
    int64_t stage_head;                           /* elements */
    int32_t first_staged;                         /* n_slots of the store */
    uint8_t *bytes;                               /* null if there are no byte slots */
    int64_t bytes_slot, bytes_head, bytes_stream; /* bytes */
} xq_side_store;

/* One layer.  On a GPU every pointer to data is a device pointer. */
typedef struct xq_store {
    int32_t n_head_kv, n_pages, n_slots, n_streams;
    int32_t n_staged, n_bytes; /* slots of the stage; byte slots */
    int32_t first_block;       /* the first page that may be sealed: those before it have no block */
    xq_side_store k, v;
    int32_t latent;           /* so many of the values' channels, the first, are the first of the keys; v: the others */
    int32_t mapped;           /* 1: V is what a map of `source` leaves over */
    xq_side_store source;     /* the values that the map reads, with own codes, as wide as V; no rows */
    const int32_t *map_heads; /* [KV head]: of the source */
    const float *map;         /* [KV head][e of the source][e] */
} xq_store;

/* Shape of a layer's storage, in elements of its kind; e = 0: nothing is stored of V. */
typedef struct xq_shape {
    int32_t d, e, n_head_kv, n_pages, n_slots, n_streams, n_bytes; /* n_bytes: byte slots */
    int32_t first_block;                                           /* the first page that has a block */
} xq_shape;

/* A store of a layer with own codes over two areas of memory (host or device; they are not looked at):
 *
 *     blocks  [stream][KV head][page from first_block on][block of xq_block_layout]; null: the layer never seals
 *     rows    F16 [stream], of each: K [KV head][slot][XQ_PAGE][d], then V [KV head][slot][XQ_PAGE][e],
 *             then pages in bytes [KV head][byte slot][block]
 *
 * with blocks_stream and rows_stream bytes from stream to stream. */
XQ_API int xq_store_init(xq_store *store, const xq_layer *layer, const xq_shape *shape, uint8_t *blocks,
                         int64_t blocks_stream, uint16_t *rows, int64_t rows_stream);
/* Bytes of a stream. */
XQ_API int64_t xq_store_block_bytes(const xq_layer *layer, const xq_shape *shape);
XQ_API int64_t xq_store_row_bytes(const xq_shape *shape);
/* A micro-batch's slots, for a call that writes rows and those that read them: F16, K [KV head][n][XQ_PAGE][d], then
 * V [KV head][n][XQ_PAGE][e]. */
XQ_API int xq_store_stage(xq_store *store, uint16_t *stage, int32_t n);
/* K's or V's codes are those that another layer stores. */
XQ_API int xq_store_borrow(xq_store *store, int32_t is_k, const xq_store *owner);
/* The first n channels of the values are those of the keys, before the e that the shape says. */
XQ_API int xq_store_latent(xq_store *store, int32_t n);
/* V is what a map of another layer's values leaves over. */
XQ_API int xq_store_map(xq_store *store, const xq_store *source, const int32_t *heads, const float *map);

/* ---- five verbs over a store, on any backend ---- */

/* Where a verb runs.
 *
 * CPU: this is thread ith of nth, and each of them makes the same call.  At most 100 KiB of a thread's stack are used,
 * nothing is allocated, and no thread waits for another: the work is done when all have returned.  A call that is
 * refused changes nothing, for all threads refuse it.
 *
 * CUDA: work is enqueued on a stream, and the call returns at once; nothing is allocated and nothing waits; launches
 * depend on shapes alone, so that they can be captured in a CUDA graph. */
typedef struct xq_exec {
    int32_t ith, nth;
    void *cuda_stream;
} xq_exec;

/* Changes pages: moves some, or writes rows, never both in one call.  The moves of a call name different pages and
 * slots.
 *
 * What is stored is finite: not-a-numbers become 0, and what is beyond F16 becomes +-65504.  Such values are counted
 * where they come in: in k_cur and v_cur, or, in rows that were put there by other means, when their page is sealed. */
typedef struct xq_update_args {
    const int32_t *seals;   /* [n_seals][XQ_MOVE_WORDS]: a page gets smaller: from rows in `slot` to bytes or codes, or
                               from bytes there to codes, as `small` says.  bit t of valid: token t counts, others are
                               given the value of the first one that does.  refill: the slot of the stage whose rows
                               move into this slot then, or XQ_SLOT_NONE.  slot XQ_SLOT_NONE: nothing moves */
    const int32_t *unseals; /* [n_unseals][XQ_MOVE_WORDS]: the way back, always to rows; valid: not looked at */
    int32_t n_seals, n_unseals;
    const int32_t *serial; /* [1], with seals: noted in *done when they are made; null: nothing is noted */
    int32_t *done;         /* [1] */
    const int32_t *rows;   /* [n_tokens]: (stream * n_slots + slot) * XQ_PAGE + token of the page; of slot n_slots + i
                              of the stage, (n_streams * n_slots + i) * XQ_PAGE + token.  Of a stage, no other row has
                              content then: on a GPU it is 0, as kernels need it, on a CPU it stays what it is */
    const float *k_cur, *v_cur; /* [token][KV head][d or e]; v_cur for e = 0: not looked at */
    int64_t k_head_stride, k_token_stride, v_head_stride, v_token_stride; /* bytes */
    int32_t n_tokens;
    int32_t rotate;        /* 1: k_cur is still to be multiplied by a normalised Hadamard matrix, as below; on a GPU */
    uint64_t *n_nonfinite; /* [1]: grows by the number of values that were not finite; null: if nothing comes in */
} xq_update_args;

/* Attention of all heads over the pages of some streams. */
typedef struct xq_attend_args {
    const float *q;                                /* [stream][token][head][d] */
    int64_t q_head_stride, q_token_stride;         /* bytes */
    const uint16_t *mask;                          /* F16 [stream][token][n_kv_pages * XQ_PAGE]; null: all is visible */
    int64_t mask_token_stride, mask_stream_stride; /* bytes */
    const int32_t *table;                          /* [stream of the cache][store.n_pages]: slot, or an xq_slot */
    const int32_t *first_stream;                   /* [1]: stream of the cache that stream 0 of q is; null: 0 */
    int32_t n_head, n_tokens, n_streams;           /* n_tokens: of each stream */
    int32_t n_kv_pages;                            /* pages that are looked at */
    float scale;                                   /* of q . k */
    float softcap;                                 /* > 0: score = softcap * tanh(score / softcap) */
    float max_bias;                                /* > 0: ALiBi */
    const float *sinks;                            /* [head] scores that take part in the sum; null: none */
    int32_t n_parts;                               /* parts that the pages of a KV head are split into */
    int32_t after_update; /* 1: the launch before this one on the CUDA stream is an update that wrote rows, and all else
                             that is read was written before it: attention may overtake it */
    int32_t rotate;       /* 1: q is still to be multiplied by the matrix by which keys were, in blocks of the largest
                             power of two that divides d; on a GPU, for it takes no launch of its own then */
    float *partial;       /* room for xq_attend_states() numbers */
    uint32_t *arrivals; /* [stream][group of query rows of a KV head][KV head]: 0, and 0 again afterwards; for one part
                           not looked at.  A group: XQ_CPU_GROUP_ROWS or XQ_CUDA_GROUP_ROWS */
    float *out;         /* [stream][token][head][latent + e] */
} xq_attend_args;

/* Numbers of the states of all parts: [part][stream][token][head][2 w + 2, mapped: 3 w + 2], w = latent + e: the
 * maximum score, the sum of p, the sum of p v over sealed pages as they are stored, over open ones, and of p u over the
 * source's. */
XQ_API int64_t xq_attend_states(const xq_store *store, const xq_attend_args *args);

/* Pages as F16 rows again. */
typedef struct xq_unpack_args {
    const int32_t *table, *first_stream; /* as above */
    int32_t n_streams, n_kv_pages;
    int32_t is_k, first_head, n_heads; /* KV heads that are wanted; is_k = 0: what is stored of V */
    uint16_t *rows;                    /* F16 [stream][n_kv_pages * XQ_PAGE][n_heads][d or e]; pages without cells: 0 */
} xq_unpack_args;

/* Attention over pages that were unpacked, for prompts on GPUs that have a kernel for it: 9.0. */
typedef struct xq_rows_args {
    const float *q;                                         /* [stream][token][head][width] */
    int64_t q_head_stride, q_token_stride, q_stream_stride; /* bytes */
    const uint16_t *k, *v;                                  /* F16 [stream][n_kv_pages * XQ_PAGE][KV head][width] */
    const uint16_t *mask;                                   /* F16 [stream][token][n_kv_pages * XQ_PAGE] */
    int64_t mask_token_stride, mask_stream_stride;          /* bytes */
    int32_t width, n_head, n_head_kv, n_tokens, n_streams;  /* width: of keys and of values; n_tokens: of a stream */
    int32_t n_kv_pages;
    float scale;        /* of q . k */
    const float *sinks; /* [head] scores that take part in the sum; null: none */
    void *scratch;      /* rows_scratch() bytes */
    float *out;         /* [stream][token][head][width]; 0 where nothing is visible */
} xq_rows_args;

/* Keys of a few pages as F32 and back, for a context shift between the two.  What is stored is finite; nobody counts
 * what was not. */
typedef struct xq_keys_args {
    const int32_t *pages;              /* [n_pages][XQ_MOVE_WORDS], different ones; slot: or an xq_slot with cells;
                                          small: not looked at */
    float *keys;                       /* F32 [page][token of the page][KV head][d] */
    int64_t head_stride, token_stride; /* bytes */
    int32_t n_pages;
} xq_keys_args;

/* A backend: XQ_OK or a negative status; error() then says why, on the same thread. */
typedef struct xq_backend {
    const char *name;
    const char *(*error)(void);
    int (*update)(const xq_store *store, const xq_update_args *args, const xq_exec *exec);
    int (*attend)(const xq_store *store, const xq_attend_args *args, const xq_exec *exec);
    int (*unpack)(const xq_store *store, const xq_unpack_args *args, const xq_exec *exec);
    int (*read_keys)(const xq_store *store, const xq_keys_args *args, const xq_exec *exec);
    int (*write_keys)(const xq_store *store, const xq_keys_args *args, const xq_exec *exec);
    /* Which kernel attend takes for a store: the kernel set; on a GPU "decode" or "wide" (tensor cores; heads of 64 and
     * 128, and of any width) or "general"; null: it is refused. */
    const char *(*attend_kernel)(const xq_store *store);
    /* Scratch memory that attend_rows needs, in bytes; -1: this device has no kernel for such rows.  What scratch is
     * need not be known yet.  On a CPU both are null. */
    int64_t (*rows_scratch)(const xq_rows_args *args);
    int (*attend_rows)(const xq_rows_args *args, const xq_exec *exec);
} xq_backend;

/* The CPU backend of libxquant; the scalar kernel set is its reference. */
XQ_API const xq_backend *xq_cpu(void);
/* The n_parts with which its attend is done first, if it has n_groups groups of query rows, of all KV heads and
 * streams, over n_pages pages, both at least 1, and n_threads threads; below 1, llama.cpp's default number: 1. */
XQ_API int32_t xq_cpu_parts(int64_t n_groups, int64_t n_pages, int32_t n_threads);
/* The CUDA backend of libxquant_cuda; the general kernel is its reference. */
XQ_API const xq_backend *xq_cuda(void);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif /* XQUANT_H */
