/* nodes.cpp: fuzz target: nodes of a graph as a client could send them to a worker.
 *
 * A good node is made by node.h's own functions.  Then some of its fields are given any values: of its parameters, of
 * its tensors' types, sizes and strides, of its sources.  Each tensor gets memory of its own, as long as ggml says that
 * it is, which is what a worker makes sure of; sometimes it lies in another's.  A node that is accepted must keep
 * within that memory; all threads refuse it or none; and a good one with good indices is run.
 */
#include "layers.h"

#include "node.h"
#include "xquant-ops.h"

#include "ggml.h"

#include <map>
#include <set>

using namespace fuzz;
using namespace xquant;

namespace {

constexpr size_t most_bytes = 1 << 21; /* of a tensor: a worker refuses one that is larger than its buffers */

/* A layer, and what a graph computes with it. */
struct sizes {
    xq_layer layer, other; /* other: whose codes it reads, or that predicts it */
    xq_shape shape, other_shape;
    int32_t latent, n_tokens, n_rep, n_parts, n_kv_pages, n_staged;
};

bool choose(input &in, sizes &s) {
    s.layer = {side(in, true), side(in, false)};
    const auto few = [&](int32_t most) { return in.ConsumeIntegralInRange<int32_t>(1, most); };
    const int32_t widths[] = {16, 64, 96, 16, 64, 128};
    const int32_t d = in.PickValueInArray(widths), e = in.PickValueInArray(widths);
    s.latent = in.ConsumeIntegralInRange<int>(0, 7) == 0 ? 16 : 0;
    s.shape = {d, s.latent > 0 && in.ConsumeBool() ? 0 : e, few(2), few(3), few(2), few(2), few(3) - 1, 0};
    s.shape.first_block = s.shape.n_pages > 1 && in.ConsumeBool() ? 1 : 0;
    s.n_tokens = few(40);
    s.n_rep = few(3);
    s.n_parts = few(3);
    s.n_kv_pages = few(s.shape.n_pages);
    s.n_staged = in.ConsumeIntegralInRange<int32_t>(0, 2);
    s.other_shape = s.shape;
    s.other_shape.n_head_kv = s.layer.v.source >= 0 && s.layer.k.owner < 0 ? few(3) : s.shape.n_head_kv;
    s.other = s.layer;
    for (xq_side *side : {&s.other.k, &s.other.v}) {
        side->owner = side->source = -1;
        side->fit = side->fit == XQ_FIT_LSQ ? XQ_FIT_MINMAX : side->fit;
    }
    xq_store store;
    uint16_t rows;
    return xq_store_block_bytes(&s.layer, &s.shape) > 0 && xq_store_block_bytes(&s.other, &s.shape) > 0 &&
           !(s.latent > 0 && s.layer.v.source >= 0) &&
           xq_store_init(&store, &s.layer, &s.shape, nullptr, 0, &rows, xq_store_row_bytes(&s.shape)) == XQ_OK &&
           (s.latent == 0 || xq_store_latent(&store, s.latent) == XQ_OK);
}

layer_tensors make_layer(input &in, ggml_context *ctx, const sizes &s) {
    const bool seals = in.ConsumeIntegralInRange<int>(0, 7) > 0, mapped = s.shape.e > 0 && s.layer.v.source >= 0;
    const auto blocks = [&](const xq_layer &layer, const xq_shape &shape) {
        const int64_t bytes = seals ? xq_store_block_bytes(&layer, &shape) : 1;
        return ggml_new_tensor_2d(ctx, GGML_TYPE_I8, bytes, s.shape.n_streams);
    };
    layer_tensors l = {};
    l.params =
        params_of(s.layer, s.shape, s.latent, mapped || s.layer.v.owner >= 0 ? &s.other : nullptr, &s.other_shape);
    l.blocks = blocks(s.layer, s.shape);
    l.rows = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, xq_store_row_bytes(&s.shape) / 2, s.shape.n_streams);
    const int64_t map = mapped ? (int64_t)s.shape.n_head_kv * s.shape.e * s.shape.e * 4 : 0;
    l.aux = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, aux_map(s.shape.n_head_kv, s.shape.n_streams) + map);
    l.k_other = s.layer.k.owner >= 0 ? blocks(s.other, s.other_shape) : nullptr;
    l.v_other = mapped || (s.shape.e > 0 && s.layer.v.owner >= 0) ? blocks(s.other, s.other_shape) : nullptr;
    return l;
}

/* A node, and the tensor that says where. */
std::pair<ggml_tensor *, ggml_tensor *> make_node(input &in, ggml_context *ctx, const sizes &s) {
    const layer_tensors l = make_layer(in, ctx, s);
    const int64_t d = s.shape.d, e = s.shape.e, heads = s.shape.n_head_kv, streams = s.shape.n_streams;
    const auto f32 = [&](int64_t a, int64_t b, int64_t c) { return ggml_new_tensor_3d(ctx, GGML_TYPE_F32, a, b, c); };
    const auto moves = [&] { return ggml_new_tensor_2d(ctx, GGML_TYPE_I32, XQ_MOVE_WORDS, 1 + in.ConsumeBool()); };
    ggml_tensor *input = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, input_size(streams, s.shape.n_pages, s.n_tokens));
    const int64_t n_stage = s.n_staged * XQ_PAGE * (d + e) * heads;
    ggml_tensor *stage = n_stage > 0 ? ggml_new_tensor_1d(ctx, GGML_TYPE_F16, n_stage) : nullptr;
    const int kind = in.ConsumeIntegralInRange<int>(0, stage ? 6 : 5);
    if (kind == 0) {
        ggml_tensor *k = f32(d, heads, s.n_tokens), *v = e > 0 ? f32(e, heads, s.n_tokens) : nullptr;
        const open_tensors made = new_update(ctx, l, input, k, v, s.n_staged, in.ConsumeBool());
        return {made.stage ? made.stage : made.rows, input};
    }
    if (kind == 1) {
        ggml_tensor *list = moves();
        return {new_moves(ctx, l, list, in.ConsumeIntegralInRange<int32_t>(0, (int32_t)list->ne[1])), list};
    }
    if (kind == 2) {
        const int64_t n_head = heads * s.n_rep;
        ggml_tensor *q = f32(d, n_head, s.n_tokens * streams);
        ggml_tensor *mask =
            ggml_new_tensor_4d(ctx, GGML_TYPE_F16, s.n_kv_pages * (int64_t)XQ_PAGE, s.n_tokens, 1, streams);
        ggml_tensor *sinks = in.ConsumeBool() ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_head) : nullptr;
        const attend_options options = {0.1f, 0.0f, 0.0f, s.n_parts, false, in.ConsumeBool()};
        return {new_attend(ctx, l, {l.rows, stage}, input, q, mask, sinks, options), input};
    }
    if (kind == 3) {
        const bool is_k = e == 0 || in.ConsumeBool();
        const int64_t ne[] = {is_k ? d : e, heads, s.n_kv_pages * (int64_t)XQ_PAGE, streams};
        return {new_unpack(ctx, l, {l.rows, stage}, input, is_k, 0, ne), input};
    }
    ggml_tensor *list = moves();
    if (kind == 6) {
        return {new_clearing(ctx, l, input, list, stage, in.ConsumeBool() ? 1 : 0), list};
    }
    ggml_tensor *keys = kind == 4 ? nullptr : f32(d, heads, list->ne[1] * XQ_PAGE);
    return {kind == 4 ? new_read_keys(ctx, l, list) : new_write_keys(ctx, l, list, keys), list};
}

/* One field with any value. */
void change(input &in, ggml_tensor *node) {
    ggml_tensor *t = node;
    const int which = in.ConsumeIntegralInRange<int>(-1, GGML_MAX_SRC - 1);
    if (which >= 0 && node->src[which]) {
        t = node->src[which];
    }
    const int axis = in.ConsumeIntegralInRange<int>(0, 3);
    switch (in.ConsumeIntegralInRange<int>(0, 6)) {
    case 0:
        t->ne[axis] = in.ConsumeBool() ? in.ConsumeIntegral<uint32_t>() : in.ConsumeIntegral<uint8_t>();
        break;
    case 1:
        t->ne[axis] += in.ConsumeIntegralInRange<int>(-1, 1);
        break;
    case 2:
        t->nb[axis] = in.ConsumeBool() ? in.ConsumeIntegral<uint32_t>() : in.ConsumeIntegral<uint8_t>();
        break;
    case 3:
        t->type = in.PickValueInArray(
            {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_I8, GGML_TYPE_I32, GGML_TYPE_Q4_0, GGML_TYPE_I64, GGML_TYPE_BF16});
        break;
    case 4:
        node->src[in.ConsumeIntegralInRange<int>(0, GGML_MAX_SRC - 1)] =
            in.ConsumeBool() ? nullptr : node->src[in.ConsumeIntegralInRange<int>(0, GGML_MAX_SRC - 1)];
        break;
    case 5: {
        auto *bytes = (uint8_t *)node->op_params;
        bytes[in.ConsumeIntegralInRange<size_t>(0, sizeof(node_params) - 1)] = in.ConsumeIntegral<uint8_t>();
        break;
    }
    default:
        ((int16_t *)node->op_params)[in.ConsumeIntegralInRange<size_t>(0, sizeof(node_params) / 2 - 1)] +=
            (int16_t)in.ConsumeIntegralInRange<int>(-2, 2);
    }
}

/* Memory of a node and its sources; false: a tensor lies at an odd address, or in another's memory. */
bool place(input &in, ggml_tensor *node, std::map<ggml_tensor *, std::unique_ptr<uint8_t[]>> &memory) {
    bool apart = true;
    std::set<ggml_tensor *> tensors = {node};
    tensors.insert(node->src, node->src + GGML_MAX_SRC);
    tensors.erase(nullptr);
    ggml_tensor *before = nullptr;
    for (ggml_tensor *t : tensors) {
        const size_t size = ggml_nbytes(t);
        if (size > most_bytes) {
            t->data = nullptr;
            continue;
        }
        const int how = in.ConsumeIntegralInRange<int>(0, 63);
        if (how == 0 && before && before->data && ggml_nbytes(before) >= size) {
            t->data = (uint8_t *)before->data + (ggml_nbytes(before) - size) / 64 * 64;
            apart = false;
            continue;
        }
        const size_t odd = how == 1 ? 1 : 0;
        apart = apart && !odd;
        memory[t] = block<uint8_t>(in, (int64_t)(size + odd));
        t->data = memory[t].get() + odd;
        before = t;
    }
    return apart;
}

/* Writes numbers over the beginning of a tensor, as far as it goes. */
void write(ggml_tensor *t, size_t offset, const std::vector<int32_t> &numbers) {
    const size_t size = t->data ? ggml_nbytes(t) : 0;
    if (offset < size) {
        memcpy((uint8_t *)t->data + offset, numbers.data(), std::min(size - offset, numbers.size() * sizeof(int32_t)));
    }
}

/* What says where: mostly what there is.  false: it is something else. */
bool fill(input &in, ggml_tensor *node, ggml_tensor *list, const sizes &s) {
    const xq_shape &shape = s.shape;
    bool good = true;
    const auto index = [&](int32_t most) {
        const int32_t i = number(in, {0, most, most / 2});
        good = good && i >= 0 && i <= most;
        return i;
    };
    std::vector<int32_t> out;
    if (list->ne[0] == XQ_MOVE_WORDS) {
        for (int32_t i = 0; i < 2; ++i) { // different pages and slots, if there are
            const std::vector<int32_t> move = {index(shape.n_streams - 1),
                                               index(shape.n_pages - 1),
                                               index(shape.n_slots + s.n_staged - 1),
                                               number(in, {XQ_SLOT_NONE, XQ_SLOT_NONE, shape.n_slots}),
                                               -1,
                                               in.ConsumeIntegral<int32_t>(),
                                               0,
                                               0,
                                               number(in, {XQ_SLOT_SEALED, XQ_SLOT_BYTES, XQ_SLOT_BYTES - i})};
            good = good && (move[1] >= shape.first_block || move[XQ_MOVE_WORDS - 1] != XQ_SLOT_SEALED);
            out.insert(out.end(), move.begin(), move.end());
        }
    } else {
        out.assign(4, 0);
        out[0] = number(in, {0, 0, 0, 0, 1});
        good = good && out[0] == 0;
        for (int32_t i = 0; i < shape.n_streams * shape.n_pages; ++i) {
            const int32_t in_bytes = shape.n_bytes > 0 ? XQ_SLOT_BYTES - i % shape.n_bytes : (int)XQ_SLOT_NONE;
            const int32_t other = in.ConsumeBool() ? (int)XQ_SLOT_NONE : in_bytes;
            out.push_back(in.ConsumeBool() ? other : index(shape.n_slots + s.n_staged - 1));
        }
        for (int32_t i = 0; i < s.n_tokens; ++i) {
            const int32_t n_rows = (shape.n_streams * shape.n_slots + s.n_staged) * XQ_PAGE;
            out.push_back(i % 8 == 0 ? index(n_rows - 1) : i);
        }
    }
    write(list, 0, out);
    ggml_tensor *aux = nullptr; // the last one of bytes; blocks come before it
    for (ggml_tensor *t : node->src) {
        aux = t && t->type == GGML_TYPE_I8 ? t : aux;
    }
    if (aux) {
        std::vector<int32_t> heads;
        for (int32_t h = 0; h < shape.n_head_kv; ++h) {
            heads.push_back(index(s.other_shape.n_head_kv - 1));
        }
        write(aux, aux_heads, heads);
    }
    return good;
}

void nodes(input &in) {
    sizes s;
    if (!choose(in, s)) {
        return;
    }
    static const bool silent = (ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr), true);
    (void)silent;
    ggml_context *ctx = ggml_init({64 * ggml_tensor_overhead(), nullptr, true});
    auto [node, list] = make_node(in, ctx, s);
    const int n_changes = in.ConsumeIntegralInRange<int>(0, 3);
    for (int i = 0; i < n_changes; ++i) {
        change(in, node);
    }
    force(sets[in.ConsumeIntegralInRange<int>(0, 1)]);
    {
        std::map<ggml_tensor *, std::unique_ptr<uint8_t[]>> memory;
        const bool apart = place(in, node, memory), fits = apart && memory.count(list) > 0;
        node_params params;
        memcpy(&params, node->op_params, sizeof(params));
        // what is still to be rotated is for a GPU
        const bool rotates = (node->op == GGML_OP_XQUANT_UPDATE || node->op == GGML_OP_XQUANT_ATTEND) &&
                             (params.flags & flag_rotates) != 0;
        const bool good = fill(in, node, list, s) && fits && n_changes == 0 && !rotates;
        bool all_there = true;
        for (const ggml_tensor *t : node->src) {
            all_there = all_there && (!t || t->data);
        }
        bool ran[3];
        for (int i = 0; i < 3; ++i) {
            ran[i] = xquant_compute_cpu(node, i, 3);
        }
        check(ran[0] == ran[1] && ran[0] == ran[2], "all threads refuse a node, or none");
        check(ran[0] || !good || !all_there || !node->data || list->ne[0] == XQ_MOVE_WORDS, "a good node is run");
    }
    ggml_free(ctx);
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in(data, size);
    nodes(in);
    return 0;
}
