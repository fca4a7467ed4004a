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
 * A layer that borrows codes has no codes part; it reads the codes of its owner with its own parameters.
 *
 * A layer whose values are mapped stores what a linear map of an earlier layer's values leaves over.  With x the values
 * of a token in the space they are stored in (rotated or not) and u^ what the source layer stores of one KV head,
 *
 *     x_j ~ sum_i u^_i W[i][j] + x^_j               sum_t p_t x_tj ~ sum_i (sum_t p_t u^_ti) W[i][j] + sum_t p_t x^_tj
 *
 * so that reading takes one more pass over the source's codes and one small product for each row of the query.
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

#if defined(_WIN32)
#define XQ_API __declspec(dllexport)
#else
#define XQ_API __attribute__((visibility("default")))
#endif

#define XQ_PAGE 128         /* tokens of a page */
#define XQ_MAX_HEAD_DIM 512 /* D and E: multiples of 16 up to this */
#define XQ_MAX_LAYERS 1024

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
    XQ_FIT_CLIP = 2,   /* the best of several shrink ratios by squared error, then as MINMAX */
    XQ_FIT_LLOYD = 3,  /* MINMAX, then three steps of assignment and least squares */
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
    int32_t rotate; /* V only: 1 multiplies by a normalised Hadamard matrix before quantization */
    int32_t owner;  /* layer whose codes are read, or -1 for own codes */
    int32_t source; /* V only: layer from whose stored values these are predicted, or -1; the map is given apart */
    float eta;      /* [0, 0.5) */
} xq_side;

typedef struct xq_layer {
    xq_side k;
    xq_side v;
} xq_layer;

/* What a whole cache stores. window < 0: never seal. */
typedef struct xq_plan {
    int32_t n_layers;
    int32_t window; /* newest tokens that stay open */
    int32_t pinned; /* first pages of a stream that stay open */
    xq_layer layers[1024];
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
/* The names of the presets, separated by commas. */
XQ_API const char *xq_plan_preset_names(void);
/* One layer as text, e.g. "k=4,128,minmax,f16,0,-1 v=2,0,lloyd,log8,0.09,-1,rot,map:5" and back.  text_size bytes at
 * most.
 */
XQ_API int xq_layer_format(const xq_layer *layer, char *text, size_t text_size);
XQ_API int xq_layer_parse(const char *text, xq_layer *layer);
/* Checks every field, and head widths d[n_layers] and e[n_layers]; d and e may be null.
 * A layer with d = 0 is not part of the cache: nothing is checked and nobody may borrow from it. */
XQ_API int xq_plan_check(const xq_plan *plan, const int32_t *d, const int32_t *e);
/* Checks one side on its own for a head width; which layer owns its codes is not looked at. */
XQ_API int xq_check_side(const xq_side *side, int32_t is_k, int32_t width);
XQ_API int xq_block_layout_of(const xq_layer *layer, int32_t d, int32_t e, xq_block_layout *layout);

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
/* x [n_rows][n] *= normalised Hadamard matrix, in blocks of the largest power of two that divides n.  Its own inverse.
 */
XQ_API int xq_hadamard(float *x, int32_t n_rows, int32_t n);

/* ---- attention ---- */

/* One KV head of one layer over a range of pages, for query rows that share the head. */
typedef struct xq_attention {
    int32_t d, e;                     /* head widths of K and V */
    xq_side k, v;                     /* how this layer stores sealed pages */
    int32_t k_code_bits, v_code_bits; /* bits of the codes that are read: own or the owner's */
    const uint8_t *k_codes, *k_param; /* of page 0; page p lies p strides on; null where absent */
    const uint8_t *v_codes, *v_param;
    int64_t k_codes_stride, k_param_stride, v_codes_stride, v_param_stride; /* bytes from page to page */
    int32_t mapped; /* 1: V is what a map of `source` leaves over, which lies in source_codes and source_param */
    xq_side source; /* with own codes, as wide as V */
    const uint8_t *source_codes, *source_param;
    int64_t source_codes_stride, source_param_stride;
    const uint16_t *k_window; /* F16 [n_slots][XQ_PAGE][d] */
    const uint16_t *v_window; /* F16 [n_slots][XQ_PAGE][e] */
    const int32_t *page_slot; /* [page_end] >= 0: open, in that slot; -1: sealed; -2: no cells */
    int32_t page_begin, page_end;
    int32_t n_rows;
    const float *const *q;       /* [n_rows] -> [d] */
    const uint16_t *const *mask; /* [n_rows] -> F16 [page_end * XQ_PAGE], added to the scores; null: no mask */
    const float *slope;          /* [n_rows] factor of the mask (ALiBi); null: 1 */
    float scale;                 /* of q . k */
    float softcap;               /* > 0: score = softcap * tanh(score / softcap) */
    float *const *partial;       /* [n_rows] -> [2 e + 2], mapped: [3 e + 2] */
} xq_attention;

/* Writes, per row, the state of an online softmax over the pages: the maximum score, the sum of p, the sum of p * v
 * over sealed pages (in the space they are stored in) [e], over open pages [e], and, if mapped, of p * u over the
 * sealed pages of the source [e].  A row that sees no cell: -inf, 0, zeros. */
XQ_API int xq_attend(const xq_attention *args);
/* Merges n_parts states of one row and finishes: out [e].  sink: an extra score that takes part in the sum; -inf: none.
 * weight: the map [e of the source][e]; null if the states are not mapped. */
XQ_API int xq_attention_merge(int32_t n_parts, const float *const *partial, int32_t e, int32_t rotate, float sink,
                              const float *weight, float *out);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif /* XQUANT_H */
