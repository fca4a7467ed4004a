/* node.cpp: makes the nodes of node.h, and turns a node into a store and the arguments of a verb, for every backend. */
#include "node-check.h"

#include "xquant-ops.h"

#include "ggml-impl.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>

namespace xquant {

/* ---- parameters ---- */

static packed_side pack(const xq_side &side) {
    const int flags = (side.param == XQ_PARAM_LOG8 ? side_log8 : 0) | (side.rotate ? side_rotated : 0) |
                      (side.owner >= 0 ? side_borrowed : 0) | (side.source >= 0 ? side_mapped : 0);
    return {(uint8_t)side.bits, (uint8_t)(side.group / 32), (uint8_t)side.fit, (uint8_t)flags, side.eta};
}

xq_side unpack(const packed_side &side) {
    return {side.bits,
            side.group * 32,
            side.fit,
            side.flags & side_log8 ? XQ_PARAM_LOG8 : XQ_PARAM_F16,
            side.flags & side_rotated ? 1 : 0,
            side.flags & side_borrowed ? 0 : -1,
            side.flags & side_mapped ? 0 : -1,
            side.eta};
}

node_params params_of(const xq_layer &layer, const xq_shape &shape, int32_t latent, const xq_layer *v_other,
                      const xq_shape *other_shape) {
    const bool mapped = layer.v.source >= 0;
    const auto units = [](int32_t bytes) { return bytes < 0 ? absent : (uint16_t)(bytes / 64); };
    node_params p = {};
    p.k = pack(layer.k);
    p.v = pack(layer.v);
    p.source = mapped ? pack(v_other->v) : packed_side{};
    p.d = (uint16_t)shape.d;
    p.e = (uint16_t)shape.e;
    p.latent = (uint16_t)latent;
    p.n_head_kv = (uint16_t)shape.n_head_kv;
    p.n_pages = shape.n_pages;
    p.n_bytes = shape.n_bytes;
    xq_block_layout at = {-1, -1, -1, -1, 0};
    if (v_other) {
        xq_block_layout_of(v_other, other_shape->d, other_shape->e, &at);
        p.other_heads = (uint16_t)other_shape->n_head_kv;
    }
    p.other_codes = units(at.v_codes);
    p.other_param = units(at.v_param);
    return p;
}

node_params params_of(const ggml_tensor *node) {
    node_params params;
    memcpy(&params, node->op_params, sizeof(params));
    return params;
}

row_counts count_rows(const node_params &p) {
    xq_shape shape = {p.d, p.e, p.n_head_kv, p.n_pages, 1, 1, 0, 0};
    const int64_t slot = xq_store_row_bytes(&shape);
    shape.n_bytes = p.n_bytes;
    const int64_t all = xq_store_row_bytes(&shape), half = (int64_t)sizeof(uint16_t);
    return slot < 0 || all < 0 ? row_counts{-1, -1} : row_counts{slot / half, (all - slot) / half};
}

int64_t blocks_of_head(const xq_layer &layer, const node_params &p, int64_t bytes) {
    xq_block_layout layout;
    const int64_t of_all_heads =
        xq_block_layout_of(&layer, p.d, p.e, &layout) == XQ_OK ? (int64_t)layout.bytes * p.n_head_kv : 0;
    return of_all_heads > 0 && bytes % of_all_heads == 0 ? bytes / of_all_heads : -1;
}

/* ---- nodes ---- */

static ggml_tensor *finish(ggml_tensor *node, ggml_op op, const node_params &params,
                           std::initializer_list<ggml_tensor *> sources) {
    ggml_set_op_params(node, &params, sizeof(params));
    node->op = op;
    GGML_ASSERT(sources.size() <= GGML_MAX_SRC);
    std::copy(sources.begin(), sources.end(), node->src);
    return node;
}

open_tensors new_update(ggml_context *ctx, const layer_tensors &l, ggml_tensor *input, ggml_tensor *k_cur,
                        ggml_tensor *v_cur, int32_t n_staged, bool rotate) {
    node_params params = l.params;
    params.flags = (uint16_t)((n_staged > 0 ? flag_stages : 0) | (rotate ? flag_rotates : 0));
    const int64_t n = n_staged * count_rows(l.params).slot;
    ggml_tensor *result = n_staged > 0 ? ggml_new_tensor_1d(ctx, GGML_TYPE_F16, n) : ggml_view_tensor(ctx, l.rows);
    finish(result, GGML_OP_XQUANT_UPDATE, params,
           {l.rows, input, nullptr, k_cur, v_cur, l.blocks, l.k_other, l.v_other, l.aux});
    return n_staged > 0 ? open_tensors{l.rows, result} : open_tensors{result, nullptr};
}

ggml_tensor *new_clearing(ggml_context *ctx, const layer_tensors &l, ggml_tensor *input, ggml_tensor *moves,
                          ggml_tensor *stage, int step) {
    node_params params = l.params;
    params.number = (int32_t)moves->ne[1];
    params.flags = step == 0 ? 0 : flag_second_step;
    return finish(ggml_view_tensor(ctx, l.rows), GGML_OP_XQUANT_UPDATE, params,
                  {l.rows, input, moves, nullptr, nullptr, l.blocks, l.k_other, l.v_other, l.aux, stage});
}

ggml_tensor *new_moves(ggml_context *ctx, const layer_tensors &l, ggml_tensor *moves, int32_t n_seals) {
    node_params params = l.params;
    params.number = n_seals;
    return finish(ggml_view_tensor(ctx, l.rows), GGML_OP_XQUANT_UPDATE, params,
                  {l.rows, nullptr, moves, nullptr, nullptr, l.blocks, l.k_other, l.v_other, l.aux});
}

ggml_tensor *new_attend(ggml_context *ctx, const layer_tensors &l, const open_tensors &open, ggml_tensor *input,
                        ggml_tensor *q, ggml_tensor *mask, ggml_tensor *sinks, const attend_options &options) {
    node_params params = l.params;
    params.number = options.n_parts;
    params.scale = options.scale;
    params.softcap = options.softcap;
    params.max_bias = options.max_bias;
    params.flags = (uint16_t)((options.after_update ? flag_after_update : 0) | (options.rotate ? flag_rotates : 0));
    const int64_t n_rows = q->ne[1] * q->ne[2], width = l.params.latent + l.params.e, n_out = width * n_rows;
    return finish(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_out + attend_state(params) * n_rows * options.n_parts),
                  GGML_OP_XQUANT_ATTEND, params,
                  {q, input, mask, open.rows, l.blocks, l.k_other, l.v_other, l.aux, sinks, open.stage});
}

ggml_tensor *new_unpack(ggml_context *ctx, const layer_tensors &l, const open_tensors &open, ggml_tensor *input,
                        bool is_k, int32_t first_head, const int64_t ne[4]) {
    node_params params = l.params;
    params.number = first_head;
    params.flags = is_k ? flag_is_k : 0;
    return finish(ggml_new_tensor(ctx, GGML_TYPE_F16, 4, ne), GGML_OP_XQUANT_UNPACK, params,
                  {input, open.rows, l.blocks, l.k_other, l.v_other, l.aux, open.stage});
}

ggml_tensor *new_read_keys(ggml_context *ctx, const layer_tensors &l, ggml_tensor *pages) {
    return finish(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, l.params.d, l.params.n_head_kv, pages->ne[1] * XQ_PAGE),
                  GGML_OP_XQUANT_READ_KEYS, l.params, {pages, l.rows, l.blocks, l.k_other, l.v_other, l.aux, nullptr});
}

ggml_tensor *new_write_keys(ggml_context *ctx, const layer_tensors &l, ggml_tensor *pages, ggml_tensor *keys) {
    return finish(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1), GGML_OP_XQUANT_WRITE_KEYS, l.params,
                  {pages, l.rows, l.blocks, l.k_other, l.v_other, l.aux, keys});
}

/* ---- from a node to a verb ---- */

/* Blocks of another layer, which are of a size of their own. */
struct other_blocks {
    uint8_t *data;              /* of page 0 */
    int64_t page, head, stream; /* bytes */

    other_blocks(const ggml_tensor *blocks, int64_t n_heads, const xq_shape &shape) {
        const int64_t n = shape.n_pages - shape.first_block;
        page = blocks->ne[0] / (n_heads * n);
        head = page * n;
        stream = (int64_t)blocks->nb[1];
        data = (uint8_t *)blocks->data - page * shape.first_block;
    }

    /* units: of 64 bytes from a block's first to its codes; without any there is nothing to set. */
    void set_codes(xq_side_store &side, uint16_t units) const {
        if (units != absent) {
            side.codes = data + (int64_t)units * 64;
            side.codes_page = page;
            side.codes_head = head;
            side.codes_stream = stream;
        }
    }
};

/* The layer of a node that was accepted; false: xq_error() says why there is none. */
static bool make_store(xq_store &store, const ggml_tensor *node) {
    const layer_sources at = sources_of(node);
    const ggml_tensor *rows = node->src[at.rows], *blocks = node->src[at.blocks], *aux = node->src[at.aux];
    const ggml_tensor *k_other = node->src[at.k_other], *v_other = node->src[at.v_other];
    const node_params p = params_of(node);
    const xq_layer layer = {unpack(p.k), unpack(p.v)};
    const row_counts in_rows = count_rows(p);
    const bool seals = blocks->ne[0] > 1;
    const xq_shape shape = {p.d,
                            p.e,
                            p.n_head_kv,
                            p.n_pages,
                            (int32_t)((rows->ne[0] - in_rows.bytes) / in_rows.slot),
                            (int32_t)rows->ne[1],
                            p.n_bytes,
                            seals ? p.n_pages - (int32_t)blocks_of_head(layer, p, blocks->ne[0]) : 0};
    if (xq_store_init(&store, &layer, &shape, seals ? (uint8_t *)blocks->data : nullptr, (int64_t)blocks->nb[1],
                      (uint16_t *)rows->data, (int64_t)rows->nb[1]) != XQ_OK ||
        (p.latent > 0 && xq_store_latent(&store, p.latent) != XQ_OK)) {
        return false;
    }
    if (const ggml_tensor *stage = stage_of(node)) {
        if (xq_store_stage(&store, (uint16_t *)stage->data, (int32_t)(stage->ne[0] / in_rows.slot)) != XQ_OK) {
            return false;
        }
    }
    if (seals && k_other) {
        other_blocks(k_other, p.n_head_kv, shape).set_codes(store.k, 0);
    }
    if (seals && p.e > 0 && layer.v.owner >= 0) {
        other_blocks(v_other, p.n_head_kv, shape).set_codes(store.v, p.other_codes);
    }
    if (seals && p.e > 0 && layer.v.source >= 0) {
        const other_blocks from(v_other, p.other_heads, shape);
        xq_side_store &source = store.source;
        store.mapped = 1;
        source.plan = unpack(p.source);
        source.width = p.e;
        from.set_codes(source, p.other_codes);
        source.param = from.data + (int64_t)p.other_param * 64;
        source.param_page = from.page;
        source.param_head = from.head;
        source.param_stream = from.stream;
        store.map_heads = (const int32_t *)((const char *)aux->data + aux_heads);
        store.map = (const float *)((const char *)aux->data + aux_map(p.n_head_kv, shape.n_streams));
    }
    return true;
}

static const int32_t *rows_of(const ggml_tensor *input, const xq_store &store) {
    return (const int32_t *)input->data + input_table + (int64_t)store.n_streams * store.n_pages;
}

static int run_update(const xq_backend &backend, const xq_store &store, const ggml_tensor *node, const xq_exec &exec) {
    ggml_tensor *const *src = node->src;
    const node_params p = params_of(node);
    xq_update_args a = {};
    a.n_nonfinite = (uint64_t *)src[update_aux]->data;
    if (const ggml_tensor *moves = src[update_moves]) {
        a.seals = (const int32_t *)moves->data;
        a.n_seals = p.number;
        a.unseals = a.seals + (int64_t)p.number * XQ_MOVE_WORDS;
        a.n_unseals = (int32_t)moves->ne[1] - p.number;
        if (const ggml_tensor *input = src[update_input]) {
            a.serial = (const int32_t *)input->data + input_serial;
            a.done = (int32_t *)((char *)src[update_aux]->data + aux_serials) + (p.flags & flag_second_step ? 1 : 0);
        }
    }
    if (const ggml_tensor *k = src[update_k_cur]) {
        a.rows = rows_of(src[update_input], store);
        a.k_cur = (const float *)k->data;
        a.k_head_stride = (int64_t)k->nb[1];
        a.k_token_stride = (int64_t)k->nb[2];
        a.n_tokens = (int32_t)k->ne[2];
        a.rotate = p.flags & flag_rotates ? 1 : 0;
    }
    if (const ggml_tensor *v = src[update_v_cur]) {
        a.v_cur = (const float *)v->data;
        a.v_head_stride = (int64_t)v->nb[1];
        a.v_token_stride = (int64_t)v->nb[2];
    }
    return backend.update(&store, &a, &exec);
}

static int run_attend(const xq_backend &backend, const xq_store &store, const ggml_tensor *node, const xq_exec &exec) {
    ggml_tensor *const *src = node->src;
    const ggml_tensor *q = src[attend_q], *mask = src[attend_mask], *sinks = src[attend_sinks];
    const node_params p = params_of(node);
    const auto *input = (const int32_t *)src[attend_input]->data;
    xq_attend_args a = {};
    a.q = (const float *)q->data;
    a.q_head_stride = (int64_t)q->nb[1];
    a.q_token_stride = (int64_t)q->nb[2];
    a.mask = (const uint16_t *)mask->data;
    a.mask_token_stride = (int64_t)mask->nb[1];
    a.mask_stream_stride = (int64_t)mask->nb[3];
    a.table = input + input_table;
    a.first_stream = store.n_streams > 1 ? input : nullptr;
    a.n_head = (int32_t)q->ne[1];
    a.n_streams = (int32_t)mask->ne[3];
    a.n_tokens = (int32_t)(q->ne[2] / mask->ne[3]);
    a.n_kv_pages = (int32_t)(mask->ne[0] / XQ_PAGE);
    a.scale = p.scale;
    a.softcap = p.softcap;
    a.max_bias = p.max_bias;
    a.sinks = sinks ? (const float *)sinks->data : nullptr;
    a.n_parts = p.number;
    a.after_update = p.flags & flag_after_update ? 1 : 0;
    a.rotate = p.flags & flag_rotates ? 1 : 0;
    a.out = (float *)node->data;
    a.partial = a.out + q->ne[1] * q->ne[2] * (p.latent + p.e);
    a.arrivals = (uint32_t *)((char *)src[attend_aux]->data + aux_arrivals(p.n_head_kv));
    static std::atomic<bool> said{false};
    const char *kernel = backend.attend_kernel(&store); // null: the verb refuses the store
    if (kernel && strcmp(kernel, "general") == 0 && !said.exchange(true)) {
        GGML_LOG_WARN(
            "xquant: no tensor-core kernel for keys of width %d in %d bits and values of width %d in %d bits%s: "
            "a general one decodes such layers, which is slower\n",
            store.k.width, store.k.plan.bits, store.v.width, store.v.plan.bits, store.mapped ? ", mapped" : "");
    }
    return backend.attend(&store, &a, &exec);
}

static int run_unpack(const xq_backend &backend, const xq_store &store, const ggml_tensor *node, const xq_exec &exec) {
    const node_params p = params_of(node);
    const auto *input = (const int32_t *)node->src[unpack_input]->data;
    xq_unpack_args a = {};
    a.table = input + input_table;
    a.first_stream = input;
    a.n_streams = (int32_t)node->ne[3];
    a.n_kv_pages = (int32_t)(node->ne[2] / XQ_PAGE);
    a.is_k = p.flags & flag_is_k ? 1 : 0;
    a.first_head = p.number;
    a.n_heads = (int32_t)node->ne[1];
    a.rows = (uint16_t *)node->data;
    return backend.unpack(&store, &a, &exec);
}

static int run_keys(const xq_backend &backend, const xq_store &store, const ggml_tensor *node, const xq_exec &exec) {
    const bool reads = node->op == GGML_OP_XQUANT_READ_KEYS;
    const ggml_tensor *pages = node->src[keys_pages], *keys = reads ? node : node->src[keys_keys];
    xq_keys_args a = {};
    a.pages = (const int32_t *)pages->data;
    a.n_pages = (int32_t)pages->ne[1];
    a.keys = (float *)keys->data;
    a.head_stride = (int64_t)keys->nb[1];
    a.token_stride = (int64_t)keys->nb[2];
    return reads ? backend.read_keys(&store, &a, &exec) : backend.write_keys(&store, &a, &exec);
}

static int run(const xq_backend &backend, const xq_store &store, const ggml_tensor *node, const xq_exec &exec) {
    switch (node->op) {
    case GGML_OP_XQUANT_UPDATE:
        return run_update(backend, store, node, exec);
    case GGML_OP_XQUANT_ATTEND:
        return run_attend(backend, store, node, exec);
    case GGML_OP_XQUANT_UNPACK:
        return run_unpack(backend, store, node, exec);
    default:
        return run_keys(backend, store, node, exec);
    }
}

bool compute(const xq_backend &backend, const ggml_tensor *node, const xq_exec &exec) {
    const char *why = nullptr;
    xq_store store;
    if (!accepts_node(node, &backend == xq_cpu())) {
        why = refusal();
    } else if (!make_store(store, node)) {
        why = xq_error();
    } else if (run(backend, store, node, exec) != XQ_OK) {
        why = backend.error();
    }
    if (why && exec.ith == 0) {
        GGML_LOG_ERROR("xquant: %s was refused: %s\n", ggml_op_name(node->op), why);
    }
    return !why;
}

bool has_kernels(ggml_backend_dev_t device) {
    ggml_tensor probe = {};
    probe.op = GGML_OP_XQUANT_UPDATE;
    return ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU ||
           ggml_backend_dev_supports_op(device, &probe);
}

} // namespace xquant

bool xquant_compute_cpu(const ggml_tensor *node, int ith, int nth) {
    return xquant::compute(*xq_cpu(), node, {ith, nth, nullptr});
}

bool xquant_compute_cuda(const xq_backend *cuda, const ggml_tensor *node, void *cuda_stream) {
    return xquant::compute(*cuda, node, {0, 1, cuda_stream});
}

uint8_t xquant_worker(ggml_backend *const *backends, int n) {
    bool all_cpus = true;
    for (int i = 0; i < n; ++i) {
        ggml_backend_dev_t device = ggml_backend_get_device(backends[i]);
        if (!xquant::has_kernels(device)) {
            return 0;
        }
        all_cpus = all_cpus && ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
    }
    return (uint8_t)(XQUANT_WORKER_VERSION | (all_cpus ? XQUANT_WORKER_CPU : 0));
}
