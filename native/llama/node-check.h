/* node-check.h: whether what a node says of its tensors is true of them.
 *
 * A node may have come over a network.  Before a verb sees it, every size, offset and count in its parameters is
 * compared with the tensors that are there, and the tensors with each other:
 *
 *     type, shape and strides are those of node.h; the bytes from the first element to the last do not overflow
 *     data is there, aligned, within its buffer, and, for a backend on the host, in the host's memory
 *     a layer's blocks, rows and aux are exactly as long as its shape says; codes and parameters that are read from
 *       another layer's blocks lie within a block
 *     what is written lies apart from what holds indices: an index that was looked at stays what it was
 *
 * What indices in tensors say (tables, rows, moves) a backend's verbs look at; the KV heads of a map on a host are
 * looked at here.
 */
#pragma once

#include "node.h"

namespace xquant {

enum side_flag : uint8_t { side_log8 = 1, side_rotated = 2, side_borrowed = 4, side_mapped = 8 };

xq_side unpack(const packed_side &side);
node_params params_of(const ggml_tensor *node);

/* Where the tensors of a layer are among a node's sources. */
struct layer_sources {
    int rows, blocks, k_other, v_other, aux;
};
layer_sources sources_of(const ggml_tensor *node);
/* The stage that a node makes or reads; null: there is none. */
const ggml_tensor *stage_of(const ggml_tensor *node);

/* Elements of a stream's rows: of one slot, and of all byte slots; -1: xq_error() says what is wrong. */
struct row_counts {
    int64_t slot, bytes;
};
row_counts count_rows(const node_params &p);
/* Blocks of a KV head in so many bytes of a stream; -1: they are not blocks. */
int64_t blocks_of_head(const xq_layer &layer, const node_params &p, int64_t bytes);

/* Numbers of the state of a query row in a part of attention. */
inline int64_t attend_state(const node_params &p) {
    return (p.v.flags & side_mapped ? 3 : 2) * (int64_t)(p.latent + p.e) + 2;
}

/* Length in bytes of a side's codes in a block of a page, and of its parameters. */
int64_t codes_bytes(const xq_side &side, bool is_k, int32_t width);
int64_t param_bytes(const xq_side &side, int32_t width);

/* False: the node must not be run, and refusal() says why, on the same thread.  All threads find the same. */
bool accepts_node(const ggml_tensor *node, bool on_host);
const char *refusal();

} // namespace xquant
