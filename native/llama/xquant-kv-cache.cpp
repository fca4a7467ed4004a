/* xquant-kv-cache.cpp: makes the cache, its tensors and its class; see xquant-kv-cache.h. */
#include "xquant-kv-cache.h"

#include "xquant-shared.h"
#include "xquant-worker.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>

namespace xquant {

/* No layers: llama_kv_cache keeps the cells, we keep the data. */
static const llama_memory_i::layer_filter_cb no_layers = [](int32_t) { return false; };

kv_cache::kv_cache(const llama_model &model, const llama_hparams &hparams, bool offload, bool unified, uint32_t kv_size,
                   uint32_t n_seq_max, uint32_t n_pad, const layer_filter_cb &filter, const layer_reuse_cb &reuse,
                   uint32_t n_ubatch)
    : llama_kv_cache(model, hparams, GGML_TYPE_F16, GGML_TYPE_F16, false, offload, unified, kv_size, n_seq_max, n_pad,
                     0, LLAMA_SWA_TYPE_NONE, nullptr, no_layers, nullptr, nullptr),
      d_(XQ_MAX_LAYERS), e_(XQ_MAX_LAYERS), by_model_layer_(hparams.n_layer_all), n_ubatch_(n_ubatch) {
    const auto holds = [&](uint32_t il) { return hparams.has_kv(il) && (!filter || filter((int32_t)il)); };
    std::vector<int32_t> heads(XQ_MAX_LAYERS);
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (holds(il)) {
            d_[il] = (int32_t)hparams.n_embd_head_k(il);
            const int32_t turned = turned_pairs(model, (int32_t)il);
            e_[il] = hparams.is_mla() ? 0 : turned >= 0 ? 2 * turned : (int32_t)hparams.n_embd_head_v(il);
            heads[il] = (int32_t)hparams.n_head_kv(il);
        }
    }
    origin_ = resolve_plan(model, d_.data(), e_.data(), heads.data(), plan_);

    xq::page_shape shape = {};
    shape.n_streams = (int32_t)n_stream;
    shape.n_cells = (int32_t)kv_size;
    shape.window = plan_.window;
    shape.pinned = plan_.pinned;
    shape.first_block = xq_plan_first_block(&plan_, shape.n_pages());
    table_ = std::make_unique<xq::page_table>(shape);
    const slot_counts counts = slots_for(1);
    table_->grow(counts.n_slots, counts.n_bytes, counts.reserved, counts.staged);

    contexts fixed, open;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (holds(il)) {
            add_layer((int32_t)il, offload, fixed);
        }
    }
    for (uint32_t il = 0; reuse && il < hparams.n_layer_all; ++il) {
        const int32_t from = reuse((int32_t)il);
        if (from >= 0 && (!filter || filter((int32_t)il))) {
            by_model_layer_[il] = by_model_layer_[from];
        }
    }
    for (const auto &l : layers_) {
        const auto last = std::find(by_model_layer_.rbegin(), by_model_layer_.rend(), l.get());
        l->last_reader = (int32_t)(by_model_layer_.rend() - last) - 1;
    }
    for (const auto &l : layers_) {
        std::tie(l->nodes.rows, l->row_streams) = new_rows(*l, open);
    }
    fixed_ = allocate(fixed, "blocks of codes");
    open_ = allocate(open, "open pages");
    fill_aux();
    clear(false);
}

void kv_cache::add_layer(int32_t il, bool offload, contexts &fixed) {
    auto l = std::make_unique<layer>();
    const auto earlier = [&](int32_t number) { return number < 0 ? l.get() : find(number); };
    const std::string name = "layer " + std::to_string(il);
    l->il = il;
    l->plan = plan_.layers[il];
    l->shape = {d_[il],
                e_[il],
                (int32_t)hparams.n_head_kv(il),
                table_->shape().n_pages(),
                table_->shape().n_slots,
                (int32_t)n_stream,
                table_->shape().n_bytes,
                table_->shape().first_block};
    l->latent = (int32_t)hparams.n_embd_head_v(il) - l->shape.e;
    l->turned = turned_pairs(model, il);
    l->k_owner = earlier(l->plan.k.owner);
    l->v_owner = earlier(l->plan.v.owner);
    l->v_source = earlier(l->plan.v.source);
    if (!l->v_source) {
        refuse(name + ": the source of its map must be an earlier layer");
    }
    if (!l->k_owner || !l->v_owner || l->k_owner->shape.n_head_kv != l->shape.n_head_kv ||
        l->v_owner->shape.n_head_kv != l->shape.n_head_kv) {
        refuse(name + ": its owner must be an earlier layer with as many KV heads");
    }
    l->map = l->plan.v.source >= 0 ? &origin_->maps.at(il) : nullptr;

    ggml_backend_dev_t device = offload ? model.dev_layer(il) : nullptr;
    l->buft = device && runs_on(device) ? ggml_backend_dev_buffer_type(device) : ggml_backend_cpu_buffer_type();
    l->on_host = ggml_backend_buft_is_host(l->buft);
    l->cpu_kernels = l->on_host || has_cpu_kernels(device);
    for (const layer *read : {l->k_owner, l->v_owner, l->v_source}) {
        if (read->buft != l->buft) {
            refuse(name + " reads what layer " + std::to_string(read->il) +
                   " stores, which lies on another device; use split_mode none, all or no layers on the GPU, or a plan "
                   "without borrowed codes and maps");
        }
    }

    xq_block_layout layout;
    if (xq_block_layout_of(&l->plan, l->shape.d, l->shape.e, &layout) != XQ_OK) {
        refuse(xq_error());
    }
    l->block_bytes = layout.bytes;
    const layer *v_other = l->plan.v.source >= 0 ? l->v_source : l->v_owner;
    layer_tensors &nodes = l->nodes;
    nodes.params =
        params_of(l->plan, l->shape, l->latent, v_other == l.get() ? nullptr : &v_other->plan, &v_other->shape);
    nodes.k_other = l->k_owner == l.get() ? nullptr : l->k_owner->nodes.blocks;
    nodes.v_other = v_other == l.get() ? nullptr : v_other->nodes.blocks;

    ggml_context *ctx = context_of(fixed, l->buft);
    // a cache that fits into its slots needs no blocks; an empty tensor would need special care everywhere
    const int64_t block_bytes = table_->seals() ? xq_store_block_bytes(&l->plan, &l->shape) : 1;
    const int64_t largest = std::max(block_bytes, xq_store_row_bytes(&l->shape));
    if (!l->on_host && largest > most_bytes(device)) {
        refuse(name + ": a stream of its cache takes " + std::to_string(largest) + " bytes, a worker may have " +
               std::to_string(most_bytes(device)) +
               "; use a smaller n_ctx, or more sequences with streams of their own");
    }
    const int64_t map_bytes = l->map ? (int64_t)(l->map->weight.size() * sizeof(float)) : 0;
    l->rotation = l->plan.k.rotate ? rotation_for(*l, fixed) : nullptr;
    if (l->rotation && has_key_bias(model, il)) {
        const auto new_factors = [&](const char *format, int64_t n_head) {
            return ggml_format_name(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, l->shape.d, n_head), format, il);
        };
        l->factors = {new_factors("cache_xq_factors_k_l%d", l->shape.n_head_kv),
                      new_factors("cache_xq_factors_q_l%d", (int64_t)hparams.n_head((uint32_t)il))};
    }
    if (origin_->transforms.count(il) > 0) {
        const auto new_matrix = [&](const char *format) {
            ggml_tensor *matrix = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, l->shape.d, l->shape.d, l->shape.n_head_kv);
            return ggml_format_name(matrix, format, il);
        };
        l->transform = {new_matrix("cache_xq_transform_k_l%d"), new_matrix("cache_xq_transform_q_l%d")};
    }
    nodes.blocks = ggml_new_tensor_2d(ctx, GGML_TYPE_I8, block_bytes, n_stream);
    nodes.aux = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, aux_map(l->shape.n_head_kv, n_stream) + map_bytes);
    ggml_format_name(nodes.blocks, "cache_xq_blocks_l%d", il);
    ggml_format_name(nodes.aux, "cache_xq_aux_l%d", il);
    for (uint32_t s = 0; s < n_stream; ++s) {
        l->block_streams.push_back(ggml_view_1d(ctx, nodes.blocks, nodes.blocks->ne[0], s * nodes.blocks->nb[1]));
    }
    by_model_layer_[il] = l.get();
    layers_.push_back(std::move(l));
}

ggml_tensor *kv_cache::rotation_for(const layer &l, contexts &fixed) {
    const int64_t n = l.shape.d & -l.shape.d; // the largest power of two that divides it
    ggml_tensor *&rotation = rotations_[{l.buft, n}];
    if (!rotation) {
        rotation = ggml_new_tensor_2d(context_of(fixed, l.buft), GGML_TYPE_F32, n, n);
        ggml_format_name(rotation, "cache_xq_rotation_%d", (int)n);
    }
    return rotation;
}

static void set_halves(ggml_tensor *tensor, const std::vector<float> &values) {
    std::vector<ggml_fp16_t> halves(values.size());
    ggml_fp32_to_fp16_row(values.data(), halves.data(), (int64_t)values.size());
    ggml_backend_tensor_set(tensor, halves.data(), 0, ggml_nbytes(tensor));
}

/* What layers' nodes read of maps, rotations and transforms. */
void kv_cache::fill_aux() const {
    for (const auto &[where, rotation] : rotations_) {
        if (!hparams.no_alloc) {
            ggml_backend_tensor_set(rotation, hadamard_matrix(where.second).data(), 0, ggml_nbytes(rotation));
        }
    }
    for (const auto &l : layers_) {
        if (l->factors.keys && !hparams.no_alloc) {
            const auto set = [](ggml_tensor *tensor, const std::vector<float> &values) {
                ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
            };
            const std::vector<float> of_keys = factors_of_keys(model, l->il);
            set(l->factors.keys, of_keys);
            set(l->factors.queries,
                factors_of_queries(of_keys, l->factors.queries->ne[1], l->shape.n_head_kv, l->shape.d));
        }
        if (l->transform.keys && !hparams.no_alloc) {
            const std::vector<float> &weight = origin_->transforms.at(l->il);
            std::vector<float> inverse;
            if (!inverse_transposed(weight, l->shape.n_head_kv, l->shape.d, inverse)) {
                refuse("xquant.transform." + std::to_string(l->il) + ".weight must be matrices with an inverse");
            }
            set_halves(l->transform.keys, weight);
            set_halves(l->transform.queries, inverse);
        }
        if (l->map && !hparams.no_alloc) {
            const auto &[heads, weight] = *l->map;
            ggml_backend_tensor_set(l->nodes.aux, heads.data(), aux_heads, heads.size() * sizeof(heads[0]));
            ggml_backend_tensor_set(l->nodes.aux, weight.data(), (size_t)aux_map(l->shape.n_head_kv, n_stream),
                                    weight.size() * sizeof(weight[0]));
        }
    }
}

const layer *kv_cache::find(int32_t il) const {
    return il >= 0 && il < (int32_t)by_model_layer_.size() ? by_model_layer_[il] : nullptr;
}

/* ---- the classes that llama.cpp makes ---- */

std::unique_ptr<llama_kv_cache> make_kv_cache(uint32_t n_ubatch, const llama_model &model, const llama_hparams &hparams,
                                              ggml_type type_k, ggml_type type_v, bool v_trans, bool offload,
                                              bool unified, uint32_t kv_size, uint32_t n_seq_max, uint32_t n_pad,
                                              uint32_t n_swa, llama_swa_type swa_type, llama_memory_t mem_other,
                                              const llama_memory_i::layer_filter_cb &filter,
                                              const llama_memory_i::layer_reuse_cb &reuse,
                                              const llama_memory_i::layer_share_cb &share) {
    if (type_k != GGML_TYPE_XQUANT) {
        return std::make_unique<llama_kv_cache>(model, hparams, type_k, type_v, v_trans, offload, unified, kv_size,
                                                n_seq_max, n_pad, n_swa, swa_type, mem_other, filter, reuse, share);
    }
    if (hparams.n_rel_attn_bkts > 0) {
        refuse_model(model, "its attention has a position bias", "f16");
    }
    if (mem_other || share) {
        refuse_model(model, "its cache shares the cells of another context", "f16");
    }
    return std::make_unique<kv_cache>(model, hparams, offload, unified, kv_size, n_seq_max, n_pad, filter, reuse,
                                      n_ubatch);
}

} // namespace xquant
