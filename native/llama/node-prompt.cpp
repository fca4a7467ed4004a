/* node-prompt.cpp: llama.cpp's own node of attention as a call of attend_rows, where its keys and values are pages that
 * nodes of ours unpacked:
 *
 *     q     F32 [width, token, head, stream]      k, v    F16 [width, cell, KV head, stream]
 *     mask  F16 [cell, token, 1, stream]          result  F32 [width, head, token, stream]
 *
 * A graph has the same nodes for every device; which kernel is taken is found where the node is run.
 */
#include "xquant-ops.h"

#include "xquant.h"

#include "ggml-impl.h"

#include <cstring>

namespace xquant {

namespace {

/* An unpacked side, seen with its cells and KV heads changed about: ne[i] > 1 alone has a stride that counts. */
bool is_unpacked(const ggml_tensor *t, int64_t width, int64_t n_cells, int64_t n_heads, int64_t n_streams) {
    const int64_t ne[] = {width, n_cells, n_heads, n_streams}, row = 2 * width;
    const int64_t nb[] = {2, row * n_heads, row, row * n_heads * n_cells};
    bool same = t->type == GGML_TYPE_F16 && t->view_src && t->view_src->op == GGML_OP_XQUANT_UNPACK;
    for (int i = 0; i < GGML_MAX_DIMS; ++i) {
        same = same && t->ne[i] == ne[i] && (ne[i] == 1 || t->nb[i] == (size_t)nb[i]);
    }
    return same;
}

/* false: attend_rows cannot be asked. */
bool make_args(const ggml_tensor *node, xq_rows_args &a) {
    const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
    const ggml_tensor *sinks = node->src[4];
    float params[3]; // scale, max_bias, softcap
    memcpy(params, node->op_params, sizeof(params));
    if (!q || !k || !v || !mask || params[1] != 0.0f || params[2] != 0.0f) {
        return false;
    }
    const int64_t width = q->ne[0], n_tokens = q->ne[1], n_head = q->ne[2], n_streams = q->ne[3];
    const int64_t n_cells = k->ne[1], n_head_kv = k->ne[2];
    const int64_t out[] = {width, n_head, n_tokens, n_streams};
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || n_cells % XQ_PAGE != 0 ||
        !is_unpacked(k, width, n_cells, n_head_kv, n_streams) ||
        !is_unpacked(v, width, n_cells, n_head_kv, n_streams) || mask->type != GGML_TYPE_F16 ||
        mask->ne[0] != n_cells || mask->ne[1] < n_tokens || mask->ne[2] != 1 || mask->ne[3] != n_streams ||
        mask->nb[0] != sizeof(uint16_t) || node->type != GGML_TYPE_F32 || !ggml_is_contiguous(node) ||
        memcmp(node->ne, out, sizeof(out)) != 0 ||
        (sinks && (sinks->type != GGML_TYPE_F32 || sinks->ne[0] != n_head || !ggml_is_contiguous(sinks)))) {
        return false;
    }
    for (const int64_t n : {n_tokens, n_head, n_streams, n_cells, n_head_kv}) {
        if (n > INT32_MAX) {
            return false;
        }
    }
    a = {};
    a.q = (const float *)q->data;
    a.q_head_stride = (int64_t)q->nb[2];
    a.q_token_stride = (int64_t)q->nb[1];
    a.q_stream_stride = (int64_t)q->nb[3];
    a.k = (const uint16_t *)k->data;
    a.v = (const uint16_t *)v->data;
    a.mask = (const uint16_t *)mask->data;
    a.mask_token_stride = (int64_t)mask->nb[1];
    a.mask_stream_stride = (int64_t)mask->nb[3];
    a.width = (int32_t)width;
    a.n_head = (int32_t)n_head;
    a.n_head_kv = (int32_t)n_head_kv;
    a.n_tokens = (int32_t)n_tokens;
    a.n_streams = (int32_t)n_streams;
    a.n_kv_pages = (int32_t)(n_cells / XQ_PAGE);
    a.scale = params[0];
    a.sinks = sinks ? (const float *)sinks->data : nullptr;
    a.out = (float *)node->data;
    return true;
}

} // namespace

} // namespace xquant

int64_t xquant_prompt_scratch(const xq_backend *cuda, const ggml_tensor *node) {
    xq_rows_args args;
    return xquant::make_args(node, args) ? cuda->rows_scratch(&args) : -1;
}

bool xquant_prompt(const xq_backend *cuda, const ggml_tensor *node, void *scratch, void *cuda_stream) {
    xq_rows_args args;
    if (!xquant::make_args(node, args)) {
        return false;
    }
    args.scratch = scratch;
    const xq_exec exec = {0, 1, cuda_stream};
    const bool done = cuda->attend_rows(&args, &exec) == XQ_OK;
    if (!done) {
        GGML_LOG_ERROR("xquant: %s was refused: %s\n", ggml_op_name(node->op), cuda->error());
    }
    return done;
}
