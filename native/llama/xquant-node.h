/* xquant-node.h: what the nodes of xquant-graph.cpp and xquant-shift.cpp say to a backend other than the CPU, and the
 * layout of their input.
 *
 * The nodes are GGML_OP_CUSTOM; node_params lie in op_params behind those of ggml_custom_op_params.  Sources:
 *
 *     update    window <- window, input, k_cur, v_cur, blocks, others, extra         in place
 *     attend    [state, head, token, part]  <- q, input, mask, blocks, update or window, others, extra, sinks
 *     merge     [e, head, token]            <- attend, sinks or attend, blocks, extra       on the CPU alone
 *     unpack    F16 [width, KV head, cell, stream] <- input, blocks, window, others, extra, update
 *     read      F32 [d, KV head, token of all pages] <- shifted pages, blocks, window, blocks of K's owner
 *     write     [1] <- keys as read gives them, shifted pages, blocks, window, blocks of K's owner
 *
 * Others are the blocks of three layers: the owners of K's and V's codes, and the source of V's map.  Extra is null for
 * layers in the CPU's memory; elsewhere it holds what they have on the host:
 *
 *     counter u64 of values that were not finite | heads i32 [KV head] | arrivals u32, see xquant_cuda.h | map F32
 *
 * each padded to 64 bytes.  There attend is one node with the merge: [e, head, token] and, behind it, room for states.
 */
#pragma once

#include "xquant_cuda.h"

#include <cstdint>
#include <cstring>

namespace xquant {

enum class node_kind : int32_t { update, attend, merge, unpack_k, unpack_v, read_keys, write_keys };

constexpr uint32_t node_magic = 0x58513031;

struct node_params {
    uint32_t magic;
    node_kind kind;
    const xq_cuda_layer *layer; /* without pointers to data: these are the sources' */
    float scale, softcap, max_bias;
    union {
        int32_t n_parts;    /* attend, merge */
        int32_t first_head; /* unpack: of the KV heads of the node */
    };
};

/* Where node_params start in op_params, in int32. */
constexpr int node_params_at = 8;

inline void set_params(int32_t *op_params, const node_params &params) {
    memcpy(op_params + node_params_at, &params, sizeof(params));
}
inline node_params get_params(const int32_t *op_params) {
    node_params params;
    memcpy(&params, op_params + node_params_at, sizeof(params));
    return params;
}

/* Query rows of one KV head from which on pages are unpacked for llama.cpp's own attention, on devices that have it:
 * each pass over the codes serves eight rows, a pass over F16 rows many more. */
constexpr int64_t rows_to_unpack = 64;

constexpr int64_t extra_heads = 64;
inline int64_t extra_arrivals(int64_t n_head_kv) {
    return extra_heads + (n_head_kv * 4 + 63) / 64 * 64;
}
inline int64_t extra_map(int64_t n_head_kv, int64_t n_streams) {
    return extra_arrivals(n_head_kv) + (n_streams * (rows_to_unpack / 8) * n_head_kv * 4 + 63) / 64 * 64;
}

struct seal_op {
    int32_t stream, page, slot;
    uint32_t valid[4]; /* tokens of the page that hold a cell */
};
struct unseal_op {
    int32_t stream, page, slot;
};
/* A page whose keys are rotated; slot -1: it is sealed. */
using shift_op = seal_op;

/* Header of the input tensor. */
enum { in_n_seal, in_n_unseal, in_n_rows, in_first_stream, in_epoch, in_header = 8 };

/* The input tensor, I32: where its parts start for n_tokens rows. */
struct input_layout {
    int64_t table, rows, seals, unseals, size;

    input_layout(int64_t n_streams, int64_t n_pages, int64_t n_slots, int64_t n_tokens) {
        const int64_t capacity = n_streams * n_slots; // a page is sealed, or unsealed, at most once a slot
        table = in_header;
        rows = table + n_streams * n_pages;
        seals = rows + n_tokens;
        unseals = seals + capacity * (int64_t)(sizeof(seal_op) / sizeof(int32_t));
        size = unseals + capacity * (int64_t)(sizeof(unseal_op) / sizeof(int32_t));
    }
};

} // namespace xquant
