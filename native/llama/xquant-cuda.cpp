/* xquant-cuda.cpp: nodes of a ggml graph to calls of libxquant_cuda. */
#include "xquant-cuda.h"

#include "xquant-node.h"

#include "ggml.h"

#include <atomic>
#include <cstdio>
#include <cstring>

namespace xquant {

/* The layer with its data: blocks, window, then the blocks of others and extra. */
static xq_cuda_layer layer_of(const node_params &params, const ggml_tensor *blocks, const ggml_tensor *window,
                              ggml_tensor *const *others /* [4] */) {
    xq_cuda_layer l = *params.layer;
    l.blocks = (uint8_t *)blocks->data;
    l.blocks_stream = (int64_t)blocks->nb[1];
    l.window = (uint16_t *)window->data;
    l.window_stream = (int64_t)window->nb[1];
    l.k_blocks = (uint8_t *)others[0]->data;
    l.k_stream = (int64_t)others[0]->nb[1];
    l.v_blocks = (uint8_t *)others[1]->data;
    l.v_stream = (int64_t)others[1]->nb[1];
    if (l.mapped) {
        l.source_blocks = (const uint8_t *)others[2]->data;
        l.source_stream = (int64_t)others[2]->nb[1];
        const char *extra = (const char *)others[3]->data;
        l.map_heads = (const int32_t *)(extra + extra_heads);
        l.map = (const float *)(extra + extra_map(l.n_head_kv, blocks->ne[1]));
    }
    return l;
}

static int update(const node_params &params, const ggml_tensor *node, void *stream) {
    ggml_tensor *const *src = node->src;
    const ggml_tensor *k_cur = src[2], *v_cur = src[3], *blocks = src[4];
    const xq_cuda_layer l = layer_of(params, blocks, src[0], src + 5);
    const auto *input = (const int32_t *)src[1]->data;
    const input_layout at(blocks->ne[1], l.n_pages, l.n_slots, k_cur->ne[2]);
    xq_cuda_update_args a = {};
    a.n_seal = input + in_n_seal;
    a.n_unseal = input + in_n_unseal;
    a.seals = input + at.seals;
    a.unseals = input + at.unseals;
    a.rows = input + at.rows;
    a.k_cur = (const float *)k_cur->data;
    a.v_cur = (const float *)v_cur->data;
    a.k_head_stride = (int64_t)k_cur->nb[1];
    a.k_token_stride = (int64_t)k_cur->nb[2];
    a.v_head_stride = (int64_t)v_cur->nb[1];
    a.v_token_stride = (int64_t)v_cur->nb[2];
    a.n_tokens = (int32_t)k_cur->ne[2];
    a.n_nonfinite = (unsigned long long *)src[8]->data;
    return xq_cuda_update(&l, &a, stream);
}

/* Says once that a layer takes the slow kernel. */
static void announce_kernel(const xq_cuda_layer &l) {
    static std::atomic<bool> said{false};
    if (strcmp(xq_cuda_attend_kernel(&l), "general") == 0 && !said.exchange(true)) {
        fprintf(stderr,
                "xquant: no tensor-core kernel for keys of width %d in %d bits and values of width %d in %d bits%s: a "
                "general one decodes such layers, which is slower\n",
                l.d, l.plan.k.bits, l.e, l.plan.v.bits, l.mapped ? ", mapped" : "");
    }
}

static int attend(const node_params &params, const ggml_tensor *node, void *stream) {
    ggml_tensor *const *src = node->src;
    const ggml_tensor *q = src[0], *mask = src[2], *window = src[4], *extra = src[8], *sinks = src[9];
    const xq_cuda_layer l = layer_of(params, src[3], window, src + 5);
    announce_kernel(l);
    const auto *input = (const int32_t *)src[1]->data;
    xq_cuda_attend_args a = {};
    a.q = (const float *)q->data;
    a.q_head_stride = (int64_t)q->nb[1];
    a.q_token_stride = (int64_t)q->nb[2];
    a.mask = (const uint16_t *)mask->data;
    a.mask_token_stride = (int64_t)mask->nb[1];
    a.mask_stream_stride = (int64_t)mask->nb[3];
    a.table = input + in_header;
    a.first_stream = src[3]->ne[1] > 1 ? input + in_first_stream : nullptr;
    a.n_head = (int32_t)q->ne[1];
    a.n_streams = (int32_t)mask->ne[3];
    a.n_tokens = (int32_t)(q->ne[2] / mask->ne[3]);
    a.n_kv_pages = (int32_t)(mask->ne[0] / XQ_PAGE);
    a.scale = params.scale;
    a.softcap = params.softcap;
    a.max_bias = params.max_bias;
    a.sinks = sinks ? (const float *)sinks->data : nullptr;
    a.n_parts = params.n_parts;
    if (window->op == GGML_OP_CUSTOM) { // the update, the node before this one
        a.n_seal = input + in_n_seal;
        a.n_unseal = input + in_n_unseal;
    }
    a.out = (float *)node->data;
    a.partial = a.out + q->ne[2] * q->ne[1] * l.e;
    a.arrivals = (uint32_t *)((char *)extra->data + extra_arrivals(l.n_head_kv));
    return xq_cuda_attend(&l, &a, stream);
}

static int unpack(const node_params &params, const ggml_tensor *node, void *stream) {
    ggml_tensor *const *src = node->src;
    const xq_cuda_layer l = layer_of(params, src[1], src[2], src + 3);
    const auto *input = (const int32_t *)src[0]->data;
    xq_cuda_unpack_args a = {};
    a.table = input + in_header;
    a.first_stream = input + in_first_stream;
    a.n_streams = (int32_t)node->ne[3];
    a.n_kv_pages = (int32_t)(node->ne[2] / XQ_PAGE);
    a.is_k = params.kind == node_kind::unpack_k;
    a.first_head = params.first_head;
    a.n_heads = (int32_t)node->ne[1];
    a.rows = (uint16_t *)node->data;
    return xq_cuda_unpack(&l, &a, stream);
}

/* Both ends of a context shift; the first source: pages. */
static int shift(node_params params, ggml_tensor *const *src, const ggml_tensor *keys, void *stream) {
    xq_cuda_layer plain = *params.layer;
    plain.mapped = 0; // values are not looked at
    params.layer = &plain;
    ggml_tensor *const others[] = {src[3], src[3], nullptr, nullptr};
    const xq_cuda_layer l = layer_of(params, src[1], src[2], others);
    xq_cuda_shift_args a = {};
    a.pages = (const int32_t *)src[0]->data;
    a.n_pages = (int32_t)(ggml_nbytes(src[0]) / sizeof(shift_op));
    a.keys = (float *)keys->data;
    a.head_stride = (int64_t)keys->nb[1];
    a.token_stride = (int64_t)keys->nb[2];
    return params.kind == node_kind::read_keys ? xq_cuda_read_keys(&l, &a, stream) : xq_cuda_write_keys(&l, &a, stream);
}

} // namespace xquant

bool xquant_cuda_supports(const ggml_tensor *node) {
    return node->op == GGML_OP_CUSTOM && xquant::get_params(node->op_params).magic == xquant::node_magic;
}

bool xquant_cuda_compute(const ggml_tensor *node, void *stream) {
    using namespace xquant;
    if (!xquant_cuda_supports(node)) {
        return false;
    }
    const node_params params = get_params(node->op_params);
    int status = XQ_OK;
    switch (params.kind) {
    case node_kind::update:
        status = update(params, node, stream);
        break;
    case node_kind::attend:
        status = attend(params, node, stream);
        break;
    case node_kind::merge: // on the CPU alone
        return false;
    case node_kind::unpack_k:
    case node_kind::unpack_v:
        status = unpack(params, node, stream);
        break;
    case node_kind::read_keys:
        status = shift(params, node->src, node, stream);
        break;
    case node_kind::write_keys:
        status = shift(params, node->src + 1, node->src[0], stream);
        break;
    }
    if (status != XQ_OK) {
        fprintf(stderr, "xquant: %s\n", xq_cuda_error());
    }
    return status == XQ_OK;
}
