/* node.h: the five operations of the fork as nodes of a ggml graph, and the way from a node to a verb of xquant.h.
 *
 *     GGML_OP_XQUANT_UPDATE      rows, in place; or a stage, and what of the rows lies in slots  <- see update_src
 *     GGML_OP_XQUANT_ATTEND      F32 [(latent + e) * head * token], and behind it room for states  <- attend_src
 *     GGML_OP_XQUANT_UNPACK      F16 [width, KV head, cell, stream]  <- unpack_src
 *     GGML_OP_XQUANT_READ_KEYS   F32 [d, KV head, token of all pages]  <- keys_src
 *     GGML_OP_XQUANT_WRITE_KEYS  [1]  <- keys_src, with the keys
 *
 * A layer is four tensors:
 *
 *     blocks  I8   [KV head * page * bytes of a block, stream], or [1] where nothing is ever sealed; of as many pages,
 *                  the last ones, as it has room for
 *     rows    F16  [elements of all slots and byte slots, stream], as xq_store_init says
 *     aux     I8   counter u64 of values that were not finite, serial numbers i32 of the last micro-batches for which
 *                  each of the two steps of clearing the stage was done | heads i32 [KV head] | arrivals u32 | map F32;
 *                  each part is padded to 64 bytes
 *     input   I32  first stream of the micro-batch, its serial number | table [stream][page] | rows [token]; padded as
 *                  below
 *
 * and, if a micro-batch fills more pages than there are slots,
 *
 *     stage   F16  [elements of its slots], as xq_store_stage says: the result of the update that writes rows, of use
 *                  until another update has moved its pages into codes and slots
 *
 * What else a verb needs is in op_params: nothing in a node points into this process, so that a node may be run by
 * another.  node.cpp is part of ggml-base; ggml-cpu and ggml-cuda call compute() with their backends.
 */
#pragma once

#include "xquant.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>

namespace xquant {

/* ---- sources ---- */

/* Others: blocks of the layer whose codes K reads, and of the one that V's codes or V's map read; else null. */
enum update_src {
    update_rows,
    update_input,
    update_moves,
    update_k_cur,
    update_v_cur,
    update_blocks,
    update_k_other,
    update_v_other,
    update_aux,
    update_stage
};
enum attend_src {
    attend_q,
    attend_input,
    attend_mask,
    attend_rows,
    attend_blocks,
    attend_k_other,
    attend_v_other,
    attend_aux,
    attend_sinks,
    attend_stage
};
enum unpack_src { unpack_input, unpack_rows, unpack_blocks, unpack_k_other, unpack_v_other, unpack_aux, unpack_stage };
enum keys_src { keys_pages, keys_rows, keys_blocks, keys_k_other, keys_v_other, keys_aux, keys_keys };

/* ---- parameters ---- */

/* xq_side in 8 bytes. */
struct packed_side {
    uint8_t bits, group, fit, flags; /* group: in units of 32 */
    float eta;
};

/* What op_params hold. */
struct node_params {
    packed_side k, v, source;
    uint16_t d, e, n_head_kv;
    uint16_t other_codes, other_param; /* V's parts in a block of v_other, in units of 64 bytes; 0xffff: absent */
    uint16_t latent;                   /* channels of the values that are those of the keys */
    uint16_t flags;                    /* update: stages, second step, rotates.  attend: after_update, rotates.  unpack:
                                          is_k */
    uint16_t other_heads;              /* KV heads of v_other */
    int32_t n_pages, n_bytes;          /* n_bytes: byte slots */
    int32_t number;                    /* update: n_seals.  attend: n_parts.  unpack: first_head */
    float scale, softcap, max_bias;
};
static_assert(sizeof(node_params) <= GGML_MAX_OP_PARAMS, "op_params are full");

constexpr uint16_t flag_after_update = 1, flag_is_k = 1, flag_stages = 1, flag_second_step = 2, flag_rotates = 4,
                   absent = 0xffff;

/* ---- layout of the small tensors ---- */

constexpr int64_t input_serial = 1, input_table = 4; /* where they are; first_stream is input[0] */

/* int32 of the input tensor. */
inline int64_t input_size(int64_t n_streams, int64_t n_pages, int64_t n_tokens) {
    return input_table + n_streams * n_pages + n_tokens;
}

/* Query rows of a KV head from which on attention on a GPU unpacks pages and calls llama.cpp's own kernels: a pass over
 * codes serves XQ_CUDA_GROUP_ROWS of them, a pass over F16 rows many more. */
constexpr int64_t rows_to_unpack = 64;
/* Groups of query rows of a KV head and stream that may be split into parts: each has a counter of arrivals. */
constexpr int64_t max_split_groups = rows_to_unpack / XQ_CUDA_GROUP_ROWS;

constexpr int64_t aux_serials = 8, aux_heads = 64; /* serials: of both steps */
inline int64_t aux_arrivals(int64_t n_head_kv) {
    return aux_heads + (n_head_kv * 4 + 63) / 64 * 64;
}
inline int64_t aux_map(int64_t n_head_kv, int64_t n_streams) {
    return aux_arrivals(n_head_kv) + (n_streams * max_split_groups * n_head_kv * 4 + 63) / 64 * 64;
}

/* ---- nodes ---- */

/* One layer as a graph sees it. */
struct layer_tensors {
    ggml_tensor *blocks, *rows, *aux;
    ggml_tensor *k_other, *v_other; /* null: the layer's own */
    node_params params;             /* of any node of the layer */
};

/* Where a graph's nodes find rows of open pages: a layer's, or its update, and the stage; null: there is none. */
struct open_tensors {
    ggml_tensor *rows, *stage;
};

struct attend_options {
    float scale, softcap, max_bias;
    int32_t n_parts;
    bool after_update; /* the layer's update is the node before it */
    bool rotate;       /* q is still to be rotated, as keys were */
};

/* The parameters of a layer, of whose values `latent` channels are those of its keys.  v_other, and its shape: the
 * layer whose values' codes it borrows, or that its map reads; null: none. */
GGML_API node_params params_of(const xq_layer &layer, const xq_shape &shape, int32_t latent, const xq_layer *v_other,
                               const xq_shape *other_shape);

/* Writes a micro-batch: k_cur, v_cur F32 [d or e, KV head, token]; v_cur: null if nothing is stored of V.  n_staged:
 * slots of the stage that it makes, or 0.  rotate: k_cur is still to be rotated. */
GGML_API open_tensors new_update(ggml_context *ctx, const layer_tensors &l, ggml_tensor *input, ggml_tensor *k_cur,
                                 ggml_tensor *v_cur, int32_t n_staged, bool rotate);
/* A step of clearing the stage, 0 or 1: moves I32 [XQ_MOVE_WORDS, n] of the stage and of slots, which it may refill. */
GGML_API ggml_tensor *new_clearing(ggml_context *ctx, const layer_tensors &l, ggml_tensor *input, ggml_tensor *moves,
                                   ggml_tensor *stage, int step);
/* The first n_seals of moves I32 [XQ_MOVE_WORDS, n] make pages smaller, the others bring them back into rows. */
GGML_API ggml_tensor *new_moves(ggml_context *ctx, const layer_tensors &l, ggml_tensor *moves, int32_t n_seals);
GGML_API ggml_tensor *new_attend(ggml_context *ctx, const layer_tensors &l, const open_tensors &open,
                                 ggml_tensor *input, ggml_tensor *q, ggml_tensor *mask, ggml_tensor *sinks,
                                 const attend_options &options);
GGML_API ggml_tensor *new_unpack(ggml_context *ctx, const layer_tensors &l, const open_tensors &open,
                                 ggml_tensor *input, bool is_k, int32_t first_head, const int64_t ne[4]);
/* pages I32 [XQ_MOVE_WORDS, n]. */
GGML_API ggml_tensor *new_read_keys(ggml_context *ctx, const layer_tensors &l, ggml_tensor *pages);
GGML_API ggml_tensor *new_write_keys(ggml_context *ctx, const layer_tensors &l, ggml_tensor *pages, ggml_tensor *keys);

/* Runs one of our nodes on a backend; false: it was refused, and the log says why. */
GGML_API bool compute(const xq_backend &backend, const ggml_tensor *node, const xq_exec &exec);

/* Whether a device of this process runs nodes. */
GGML_API bool has_kernels(ggml_backend_dev_t device);

} // namespace xquant
