/* node-check.cpp: see node-check.h. */
#include "node-check.h"

#include "ggml-backend.h"

#include <cstdarg>
#include <cstdio>
#include <initializer_list>
#include <utility>

namespace xquant {

namespace {

thread_local char message[256];

bool refuse(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool refuse(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    return false;
}

bool in_range(const char *name, int64_t value, int64_t least, int64_t most) {
    return (value >= least && value <= most) ||
           refuse("%s is %lld, must be %lld to %lld", name, (long long)value, (long long)least, (long long)most);
}

/* ---- one tensor ---- */

constexpr int64_t any = -1; /* elements along an axis: at least 1 */
constexpr int64_t most_elements = (int64_t)1 << 40, most_bytes = (int64_t)1 << 47;
constexpr int64_t most_slots = 1 << 22; /* and streams, as the verbs have it */

/* What a tensor must be. */
struct wanted {
    const char *name;
    ggml_type type;
    int64_t ne[4];
    bool packed; /* without gaps; else the first axis alone */
};

/* Bytes from a tensor's first element to past its last, of a type without blocks; -1: none, or more than there can be.
 */
int64_t extent_of(const ggml_tensor *t) {
    int64_t bytes = (int64_t)ggml_type_size(t->type);
    for (int i = 0; i < GGML_MAX_DIMS; ++i) {
        int64_t step;
        if (t->ne[i] < 1 || t->nb[i] > (size_t)INT64_MAX ||
            __builtin_mul_overflow(t->ne[i] - 1, (int64_t)t->nb[i], &step) ||
            __builtin_add_overflow(bytes, step, &bytes) || bytes > most_bytes) {
            return -1;
        }
    }
    return bytes;
}

/* Bytes that an address must be a multiple of: aux begins with a u64. */
size_t alignment_of(ggml_type type) {
    return type == GGML_TYPE_I8 ? sizeof(uint64_t) : ggml_type_size(type);
}

bool is_tensor(const ggml_tensor *t, bool on_host, const wanted &want) {
    if (!t) {
        return refuse("%s is missing", want.name);
    }
    if (t->type != want.type) {
        return refuse("%s is of type %d, must be %s", want.name, (int)t->type, ggml_type_name(want.type));
    }
    size_t packed = ggml_type_size(want.type);
    for (int i = 0; i < GGML_MAX_DIMS; ++i) {
        const bool is_any = want.ne[i] == any;
        if (t->ne[i] < (is_any ? 1 : want.ne[i]) || t->ne[i] > (is_any ? most_elements : want.ne[i])) {
            return refuse("%s has %lld elements along axis %d, must have %lld%s", want.name, (long long)t->ne[i], i,
                          is_any ? 1LL : (long long)want.ne[i], is_any ? " or more" : "");
        }
        const bool fits = i == 0 || want.packed ? t->nb[i] == packed : t->nb[i] % ggml_type_size(want.type) == 0;
        if (t->ne[i] > 1 && !fits) { // over a network the strides of axes of 1 may be cut off
            return refuse("%s has a stride of %zu bytes along axis %d", want.name, t->nb[i], i);
        }
        packed *= (size_t)t->ne[i];
    }
    const int64_t extent = extent_of(t);
    if (extent < 0) {
        return refuse("%s is larger than memory", want.name);
    }
    if (!t->data || (uintptr_t)t->data % alignment_of(want.type) != 0) {
        return refuse("%s has no memory, or at an address that is not a multiple of %zu", want.name,
                      alignment_of(want.type));
    }
    if (!t->buffer) {
        return true;
    }
    const auto base = (uintptr_t)ggml_backend_buffer_get_base(t->buffer), data = (uintptr_t)t->data;
    const auto size = (int64_t)ggml_backend_buffer_get_size(t->buffer);
    if (data < base || (int64_t)(data - base) > size - extent) {
        return refuse("%s does not lie within its buffer", want.name);
    }
    return !on_host || ggml_backend_buffer_is_host(t->buffer) || refuse("%s is not in the host's memory", want.name);
}

/* Tensors may be null: they lie apart from everything. */
bool are_apart(const ggml_tensor *a, const ggml_tensor *b) {
    if (!a || !b) {
        return true;
    }
    const char *from_a = (const char *)a->data, *from_b = (const char *)b->data;
    return from_a + extent_of(a) <= from_b || from_b + extent_of(b) <= from_a ||
           refuse("%s and %s overlap", *a->name ? a->name : "an output", *b->name ? b->name : "an input");
}

/* written: what the node writes beside its layer; indices: what says where. */
bool are_apart(const ggml_tensor *node, const ggml_tensor *written, const ggml_tensor *indices) {
    const layer_sources at = sources_of(node);
    const ggml_tensor *rows = node->src[at.rows], *blocks = node->src[at.blocks], *aux = node->src[at.aux];
    for (const ggml_tensor *t : {rows, blocks, written, stage_of(node)}) {
        if (!are_apart(t, indices) || !are_apart(t, aux)) {
            return false;
        }
    }
    return are_apart(aux, indices);
}

/* A stage of whole slots. */
bool is_stage(const ggml_tensor *node, int64_t slot /* elements */, bool on_host) {
    const ggml_tensor *stage = stage_of(node);
    if (!stage) {
        return true;
    }
    return is_tensor(stage, on_host, {"stage", GGML_TYPE_F16, {any, 1, 1, 1}, true}) &&
           (stage->ne[0] % slot == 0 ||
            refuse("stage has %lld elements, must be slots of %lld", (long long)stage->ne[0], (long long)slot)) &&
           in_range("slots of the stage", stage->ne[0] / slot, 1, most_slots);
}

/* ---- a layer ---- */

/* What a node's parameters and the tensors of its layer say of each other. */
struct layer_shape {
    node_params p;
    xq_layer plan;
    xq_shape shape;
    bool seals, mapped;
};

/* Blocks of another layer of so many KV heads, of which parts are read: offset and length in a block. */
bool is_other(const char *name, const ggml_tensor *t, const layer_shape &l, int64_t n_heads, bool on_host,
              std::initializer_list<std::pair<int64_t, int64_t>> parts) {
    if (!is_tensor(t, on_host, {name, GGML_TYPE_I8, {any, l.shape.n_streams, 1, 1}, true})) {
        return false;
    }
    const int64_t n_blocks = n_heads * (l.shape.n_pages - l.shape.first_block), bytes = t->ne[0] / n_blocks;
    if (t->ne[0] % n_blocks != 0 || bytes % 64 != 0) {
        return refuse("%s has %lld bytes of a stream, must be %lld blocks of a multiple of 64", name,
                      (long long)t->ne[0], (long long)n_blocks);
    }
    for (const auto &[offset, length] : parts) {
        if (offset < 0 || offset > bytes - length) {
            return refuse("%s: %lld bytes at %lld of a block of %lld", name, (long long)length, (long long)offset,
                          (long long)bytes);
        }
    }
    return true;
}

bool accepts_others(const ggml_tensor *node, const layer_shape &l, bool on_host) {
    const layer_sources at = sources_of(node);
    const ggml_tensor *k_other = node->src[at.k_other], *v_other = node->src[at.v_other], *aux = node->src[at.aux];
    const bool v_borrows = l.shape.e > 0 && l.plan.v.owner >= 0;
    if (!l.seals) {
        return true; // nothing of them is read
    }
    if ((l.plan.k.owner >= 0) != (k_other != nullptr) ||
        (l.shape.e > 0 && (v_borrows || l.mapped) != (v_other != nullptr))) {
        return refuse("blocks of another layer are there and not wanted, or wanted and not there");
    }
    if (k_other &&
        !is_other("k_other", k_other, l, l.shape.n_head_kv, on_host, {{0, codes_bytes(l.plan.k, true, l.shape.d)}})) {
        return false;
    }
    // without codes nothing says where they are
    const auto part = [](uint16_t units, int64_t length) {
        return std::make_pair(length > 0 ? (int64_t)units * 64 : 0, length);
    };
    if (v_borrows) {
        return is_other("v_other", v_other, l, l.shape.n_head_kv, on_host,
                        {part(l.p.other_codes, codes_bytes(l.plan.v, false, l.shape.e))});
    }
    if (!l.mapped) {
        return true;
    }
    const xq_side source = unpack(l.p.source);
    if (xq_check_side(&source, 0, l.shape.e) != XQ_OK || source.owner >= 0 || source.source >= 0) {
        return refuse("the source of the map must have codes of its own: %s", xq_error());
    }
    if (!in_range("KV heads of the source of the map", l.p.other_heads, 1, INT16_MAX)) {
        return false;
    }
    if (!is_other("v_other", v_other, l, l.p.other_heads, on_host,
                  {part(l.p.other_codes, codes_bytes(source, false, l.shape.e)),
                   part(l.p.other_param, param_bytes(source, l.shape.e))})) {
        return false;
    }
    const auto *heads = (const int32_t *)((const char *)aux->data + aux_heads);
    for (int32_t h = 0; on_host && h < l.shape.n_head_kv; ++h) {
        if (!in_range("a KV head of the map", heads[h], 0, l.p.other_heads - 1)) {
            return false;
        }
    }
    return true;
}

bool accepts_layer(const ggml_tensor *node, bool on_host, layer_shape &l) {
    const layer_sources at = sources_of(node);
    const ggml_tensor *rows = node->src[at.rows], *blocks = node->src[at.blocks], *aux = node->src[at.aux];
    const node_params p = params_of(node);
    l.p = p;
    l.plan = {unpack(p.k), unpack(p.v)};
    l.shape = {p.d, p.e, p.n_head_kv, p.n_pages, 1, 1, p.n_bytes, 0};
    l.mapped = p.e > 0 && l.plan.v.source >= 0;
    const row_counts in_rows = count_rows(p);
    if (xq_store_block_bytes(&l.plan, &l.shape) < 0 || in_rows.slot < 0) {
        return refuse("%s", xq_error());
    }
    if (!is_tensor(rows, on_host, {"rows", GGML_TYPE_F16, {any, any, 1, 1}, true}) ||
        !in_range("streams of rows", rows->ne[1], 1, most_slots)) {
        return false;
    }
    const int64_t of_slots = rows->ne[0] - in_rows.bytes, n_slots = of_slots / in_rows.slot;
    if (of_slots % in_rows.slot != 0 || n_slots < 1 || n_slots > most_slots) {
        return refuse("rows have %lld elements a stream, must be %lld of %d byte slots and up to %lld slots of %lld",
                      (long long)rows->ne[0], (long long)in_rows.bytes, p.n_bytes, (long long)most_slots,
                      (long long)in_rows.slot);
    }
    if (!is_stage(node, in_rows.slot, on_host)) {
        return false;
    }
    l.shape.n_slots = (int32_t)n_slots;
    l.shape.n_streams = (int32_t)rows->ne[1];
    l.seals = blocks && blocks->ne[0] != 1; // else there is nothing in them
    if (l.seals) {
        const int64_t n = blocks_of_head(l.plan, p, blocks->ne[0]);
        if (n < 1 || n > p.n_pages) {
            return refuse("blocks have %lld bytes of a stream, must be blocks of %d KV heads and 1 to %d pages",
                          (long long)blocks->ne[0], p.n_head_kv, p.n_pages);
        }
        l.shape.first_block = p.n_pages - (int32_t)n;
    }
    const int64_t map_bytes = l.mapped ? (int64_t)p.n_head_kv * p.e * p.e * (int64_t)sizeof(float) : 0;
    const int64_t aux_bytes = aux_map(p.n_head_kv, rows->ne[1]) + map_bytes;
    return is_tensor(blocks, on_host, {"blocks", GGML_TYPE_I8, {l.seals ? any : 1, rows->ne[1], 1, 1}, true}) &&
           is_tensor(aux, on_host, {"aux", GGML_TYPE_I8, {aux_bytes, 1, 1, 1}, true}) &&
           are_apart(stage_of(node), rows) && are_apart(stage_of(node), blocks) && accepts_others(node, l, on_host);
}

/* The input tensor, for the rows of so many tokens. */
bool is_input(const ggml_tensor *t, const layer_shape &l, int64_t n_tokens, bool on_host) {
    return is_tensor(t, on_host, {"input", GGML_TYPE_I32, {any, 1, 1, 1}, true}) &&
           in_range("length of input", t->ne[0], input_size(l.shape.n_streams, l.shape.n_pages, n_tokens),
                    most_elements);
}

/* ---- nodes ---- */

static bool may_rotate(const layer_shape &l, bool on_host) {
    return !(on_host && l.p.flags & flag_rotates) || refuse("rows are still to be rotated, which the CPU does not do");
}

bool accepts_update(const ggml_tensor *node, const layer_shape &l, bool on_host) {
    const ggml_tensor *const *src = node->src;
    const ggml_tensor *moves = src[update_moves], *k = src[update_k_cur], *v = src[update_v_cur];
    if ((moves != nullptr) == (k != nullptr)) {
        return refuse("pages are moved or rows are written, and never both");
    }
    if (moves) {
        return is_tensor(moves, on_host, {"moves", GGML_TYPE_I32, {XQ_MOVE_WORDS, any, 1, 1}, true}) &&
               in_range("moves", moves->ne[1], 1, INT32_MAX) && in_range("n_seals", l.p.number, 0, moves->ne[1]) &&
               (!src[update_input] ||
                (is_input(src[update_input], l, 0, on_host) && are_apart(node, nullptr, src[update_input]))) &&
               are_apart(node, nullptr, moves);
    }
    const int64_t n_heads = l.shape.n_head_kv;
    return may_rotate(l, on_host) &&
           is_tensor(k, on_host, {"k_cur", GGML_TYPE_F32, {l.shape.d, n_heads, any, 1}, false}) &&
           (l.shape.e == 0 ||
            is_tensor(v, on_host, {"v_cur", GGML_TYPE_F32, {l.shape.e, n_heads, k->ne[2], 1}, false})) &&
           in_range("tokens of k_cur", k->ne[2], 1, INT32_MAX) && is_input(src[update_input], l, k->ne[2], on_host) &&
           are_apart(node, nullptr, src[update_input]);
}

bool accepts_attend(const ggml_tensor *node, const layer_shape &l, bool on_host) {
    const ggml_tensor *q = node->src[attend_q], *mask = node->src[attend_mask], *sinks = node->src[attend_sinks];
    const ggml_tensor *input = node->src[attend_input];
    if (!may_rotate(l, on_host) || !is_tensor(q, on_host, {"q", GGML_TYPE_F32, {l.shape.d, any, any, 1}, false}) ||
        !is_tensor(mask, on_host, {"mask", GGML_TYPE_F16, {any, any, 1, any}, false}) ||
        !in_range("streams of the mask", mask->ne[3], 1, l.shape.n_streams) ||
        !in_range("cells of the mask", mask->ne[0], XQ_PAGE, (int64_t)l.shape.n_pages * XQ_PAGE) ||
        !is_input(input, l, 0, on_host)) {
        return false;
    }
    if (!in_range("heads of q", q->ne[1], 1, INT32_MAX) || !in_range("tokens of q", q->ne[2], 1, INT32_MAX)) {
        return false;
    }
    const int64_t n_head = q->ne[1], n_tokens = q->ne[2] / mask->ne[3], n_rep = n_head / l.shape.n_head_kv;
    if (q->ne[2] % mask->ne[3] != 0 || n_head % l.shape.n_head_kv != 0 || mask->ne[1] < n_tokens) {
        return refuse("q has %lld heads and %lld tokens, the layer %d KV heads, the mask %lld tokens in %lld streams",
                      (long long)n_head, (long long)q->ne[2], l.shape.n_head_kv, (long long)mask->ne[1],
                      (long long)mask->ne[3]);
    }
    const int64_t n_rows = n_head * q->ne[2], n_parts = l.p.number, width = l.p.latent + l.shape.e;
    const int64_t rows_a_group = on_host ? XQ_CPU_GROUP_ROWS : XQ_CUDA_GROUP_ROWS;
    const int64_t n_groups = (n_tokens * n_rep + rows_a_group - 1) / rows_a_group;
    if (!in_range("heads times tokens", n_rows, 1, INT32_MAX) || !in_range("n_parts", n_parts, 1, INT16_MAX) ||
        (n_parts > 1 && !in_range("groups of rows in parts", n_groups, 1, max_split_groups)) ||
        !in_range("width of the values", width, 16, XQ_MAX_HEAD_DIM)) {
        return false;
    }
    const int64_t n_out = n_rows * (width + n_parts * attend_state(l.p));
    return is_tensor(node, on_host, {"the result", GGML_TYPE_F32, {n_out, 1, 1, 1}, true}) &&
           (!sinks || is_tensor(sinks, on_host, {"sinks", GGML_TYPE_F32, {n_head, 1, 1, 1}, true})) &&
           are_apart(node, node, input);
}

bool accepts_unpack(const ggml_tensor *node, const layer_shape &l, bool on_host) {
    const bool is_k = (l.p.flags & flag_is_k) != 0;
    const int32_t width = is_k ? l.shape.d : l.shape.e;
    const ggml_tensor *input = node->src[unpack_input];
    return is_tensor(node, on_host, {"the result", GGML_TYPE_F16, {width, any, any, any}, true}) &&
           in_range("cells of the result", node->ne[2], XQ_PAGE, (int64_t)l.shape.n_pages * XQ_PAGE) &&
           in_range("streams of the result", node->ne[3], 1, l.shape.n_streams) &&
           in_range("first_head", l.p.number, 0, l.shape.n_head_kv - 1) &&
           in_range("heads of the result", node->ne[1], 1, l.shape.n_head_kv - (int64_t)l.p.number) &&
           is_input(input, l, 0, on_host) && are_apart(node, node, input);
}

bool accepts_keys(const ggml_tensor *node, const layer_shape &l, bool on_host) {
    const bool reads = node->op == GGML_OP_XQUANT_READ_KEYS;
    const ggml_tensor *pages = node->src[keys_pages], *keys = reads ? node : node->src[keys_keys];
    if (!is_tensor(pages, on_host, {"pages", GGML_TYPE_I32, {XQ_MOVE_WORDS, any, 1, 1}, true})) {
        return false;
    }
    const int64_t n_tokens = pages->ne[1] * XQ_PAGE;
    return in_range("pages", pages->ne[1], 1, INT32_MAX) &&
           is_tensor(keys, on_host, {"keys", GGML_TYPE_F32, {l.shape.d, l.shape.n_head_kv, n_tokens, 1}, reads}) &&
           are_apart(node, reads ? node : nullptr, pages);
}

} // namespace

const ggml_tensor *stage_of(const ggml_tensor *node) {
    switch (node->op) {
    case GGML_OP_XQUANT_UPDATE:
        return params_of(node).flags & flag_stages ? node : node->src[update_stage];
    case GGML_OP_XQUANT_ATTEND:
        return node->src[attend_stage];
    case GGML_OP_XQUANT_UNPACK:
        return node->src[unpack_stage];
    default:
        return nullptr;
    }
}

layer_sources sources_of(const ggml_tensor *node) {
    switch (node->op) {
    case GGML_OP_XQUANT_UPDATE:
        return {update_rows, update_blocks, update_k_other, update_v_other, update_aux};
    case GGML_OP_XQUANT_ATTEND:
        return {attend_rows, attend_blocks, attend_k_other, attend_v_other, attend_aux};
    case GGML_OP_XQUANT_UNPACK:
        return {unpack_rows, unpack_blocks, unpack_k_other, unpack_v_other, unpack_aux};
    default:
        return {keys_rows, keys_blocks, keys_k_other, keys_v_other, keys_aux};
    }
}

int64_t codes_bytes(const xq_side &side, bool is_k, int32_t width) {
    return side.bits == 0 ? 0 : xq_packed_bytes(side.bits, is_k ? width : XQ_PAGE, is_k ? XQ_PAGE : width);
}

int64_t param_bytes(const xq_side &side, int32_t width) {
    const xq_layer layer = {{0, XQ_PAGE, XQ_FIT_PAPER, XQ_PARAM_F16, 0, -1, -1, 0.0f}, side};
    xq_block_layout at;
    return xq_block_layout_of(&layer, width, width, &at) == XQ_OK ? at.bytes - at.v_param : -1;
}

bool accepts_node(const ggml_tensor *node, bool on_host) {
    layer_shape l;
    if (!accepts_layer(node, on_host, l)) {
        return false;
    }
    switch (node->op) {
    case GGML_OP_XQUANT_UPDATE:
        return accepts_update(node, l, on_host);
    case GGML_OP_XQUANT_ATTEND:
        return accepts_attend(node, l, on_host);
    case GGML_OP_XQUANT_UNPACK:
        return accepts_unpack(node, l, on_host);
    default:
        return accepts_keys(node, l, on_host);
    }
}

const char *refusal() {
    return message;
}

} // namespace xquant
