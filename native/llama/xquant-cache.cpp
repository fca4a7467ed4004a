/* xquant-cache.cpp: the storage of a cache and what is told of it; see xquant-cache.h for the layout. */
#include "xquant-cache.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

namespace xquant {

cache::cache(llama_kv_cache &kv, uint32_t kv_size, const llama_memory_i::layer_filter_cb &filter)
    : kv(kv), d_(XQ_MAX_LAYERS), e_(XQ_MAX_LAYERS), n_streams(kv.n_stream) {
    const llama_hparams &hparams = kv.hparams;
    if (kv.other) {
        refuse("a cache that shares the cells of another context cannot be of type xquant; use f16");
    }
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (hparams.has_kv(il) && (!filter || filter(il))) {
            d_[il] = (int32_t)hparams.n_embd_head_k(il);
            e_[il] = (int32_t)hparams.n_embd_head_v(il);
        }
    }
    resolve_plan(kv.model, d_.data(), e_.data(), plan_);

    // sequences that share a stream each want their window and their pinned pages
    const uint64_t n_seq = n_streams == 1 ? kv.n_seq_max : 1;
    n_pages = pages_of(kv_size);
    n_slots = n_pages;
    seals = false;
    if (plan_.window >= 0) {
        window = (uint64_t)plan_.window * n_seq;
        const uint64_t wanted = (uint64_t)plan_.pinned * n_seq + pages_of(window) + pages_of(announced_n_ubatch()) + 1;
        seals = wanted < (uint64_t)n_pages;
        n_slots = seals ? (int32_t)wanted : n_pages;
    }
    streams.resize(n_streams);
    clear();
}

bool cache::runs_on(ggml_backend_dev_t device) {
    if (ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        return true;
    }
    ggml_tensor probe = {};
    probe.op = GGML_OP_CUSTOM;
    set_params(probe.op_params, {node_magic, node_kind::update, nullptr, 0.0f, 0.0f, 0.0f, 0});
    const bool known = ggml_backend_dev_supports_op(device, &probe);
    if (!known) {
        LLAMA_LOG_WARN(
            "%s: xquant: no XQuant kernels; the cache and the attention of its layers stay on the CPU, which "
            "is slower\n",
            ggml_backend_dev_name(device));
    }
    return known;
}

std::pair<ggml_tensor *, ggml_tensor *> cache::add_layer(ggml_context *ctx, ggml_backend_buffer_type_t buft,
                                                         uint32_t il) {
    auto l = std::make_unique<layer>();
    l->home = this;
    l->il = il;
    l->d = d_[il];
    l->e = e_[il];
    l->n_head_kv = (int32_t)kv.hparams.n_head_kv(il);
    l->n_pages = n_pages;
    l->n_slots = n_slots;
    l->plan = plan_.layers[il];
    l->n_nonfinite = &n_nonfinite;
    if (xq_block_layout_of(&l->plan, l->d, l->e, &l->layout) != XQ_OK) {
        refuse(xq_error());
    }
    l->k_owner = l->plan.k.owner < 0 ? l.get() : find(l->plan.k.owner);
    l->v_owner = l->plan.v.owner < 0 ? l.get() : find(l->plan.v.owner);
    l->v_source = l->plan.v.source < 0 ? l.get() : find(l->plan.v.source);
    if (!l->v_source) {
        refuse("layer " + std::to_string(il) + ": the source of its map must be an earlier layer");
    }
    if (l->plan.v.source >= 0) {
        l->map = &kv.model.xq->maps.at((int32_t)il);
    }
    if (!l->k_owner || !l->v_owner || l->k_owner->n_head_kv != l->n_head_kv || l->v_owner->n_head_kv != l->n_head_kv) {
        refuse("layer " + std::to_string(il) + ": its owner must be an earlier layer with as many KV heads");
    }

    l->buft = buft;
    for (const layer *read : {l->k_owner, l->v_owner, l->v_source}) {
        if (read->buft != buft) {
            refuse("layer " + std::to_string(il) + " reads what layer " + std::to_string(read->il) +
                   " stores, which lies on another device; use split_mode none, all or no layers on the GPU, or a plan "
                   "without borrowed codes and maps");
        }
    }

    // a cache that fits into its window needs no blocks; an empty tensor would need special care everywhere
    const int64_t block_bytes = seals ? l->head_blocks() * l->n_head_kv : XQ_PAGE;
    l->blocks = ggml_new_tensor_2d(ctx, GGML_TYPE_I8, block_bytes, n_streams);
    l->window = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, l->window_elements(), n_streams);
    ggml_format_name(l->blocks, "cache_xq_blocks_l%d", (int)il);
    ggml_format_name(l->window, "cache_xq_window_l%d", (int)il);
    for (uint32_t s = 0; s < n_streams; ++s) {
        l->blocks_stream.push_back(ggml_view_1d(ctx, l->blocks, l->blocks->ne[0], s * l->blocks->nb[1]));
        l->window_stream.push_back(ggml_view_1d(ctx, l->window, l->window->ne[0], s * l->window->nb[1]));
    }
    l->device.d = l->d;
    l->device.e = l->e;
    l->device.n_head_kv = l->n_head_kv;
    l->device.n_pages = n_pages;
    l->device.n_slots = n_slots;
    l->device.plan = l->plan;
    l->device.own = l->layout;
    l->device.k_owner = l->k_owner->layout;
    l->device.v_owner = l->v_owner->layout;
    if (l->map) {
        l->device.mapped = 1;
        l->device.source = l->v_source->plan.v;
        l->device.source_layout = l->v_source->layout;
    }
    if (!ggml_backend_buft_is_host(buft)) {
        const int64_t map_bytes = l->map ? (int64_t)(l->map->weight.size() * sizeof(float)) : 0;
        l->extra = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, extra_map(l->n_head_kv, n_streams) + map_bytes);
        ggml_format_name(l->extra, "cache_xq_extra_l%d", (int)il);
    }
    layers_.push_back(std::move(l));
    return {layers_.back()->blocks, layers_.back()->window};
}

const cache::layer *cache::find(int il) const {
    for (const auto &l : layers_) {
        if ((int)l->il == il) {
            return l.get();
        }
    }
    return nullptr;
}

/* Maps, for layers on other devices. */
void cache::fill_extra() {
    for (const auto &l : layers_) {
        if (l->extra && l->map) {
            const auto &[heads, weight] = *l->map;
            ggml_backend_tensor_set(l->extra, heads.data(), extra_heads, heads.size() * sizeof(int32_t));
            ggml_backend_tensor_set(l->extra, weight.data(), (size_t)extra_map(l->n_head_kv, n_streams),
                                    weight.size() * sizeof(float));
        }
    }
    extra_filled = true;
}

uint64_t cache::count_nonfinite() const {
    uint64_t n = n_nonfinite.load();
    for (const auto &l : layers_) {
        if (l->extra && l->extra->data) {
            uint64_t of_layer = 0;
            ggml_backend_tensor_get(l->extra, &of_layer, 0, sizeof(of_layer));
            n += of_layer;
        }
    }
    return n;
}

bool cache::move_rows(int32_t il, bool is_value, int32_t head, int32_t n_cells,
                      const std::function<void(ggml_tensor *, size_t offset, size_t at, size_t bytes)> &move) const {
    const layer *l = find(il);
    if (!l || head < 0 || head >= l->n_head_kv || n_cells < 0 || (int64_t)n_cells > (int64_t)n_pages * XQ_PAGE) {
        return false;
    }
    const int64_t slot = is_value ? l->v_slot() : l->k_slot(), width = slot / XQ_PAGE;
    for (int32_t p = 0; p < pages_of((uint64_t)n_cells); ++p) {
        if (streams[0].pages[p].state < 0) {
            return false;
        }
        const int64_t first = (is_value ? l->v_window(head) : l->k_window(head)) + streams[0].pages[p].state * slot;
        const int64_t n = std::min<int64_t>(XQ_PAGE, n_cells - (int64_t)p * XQ_PAGE) * width;
        move(l->window_stream[0], (size_t)first * sizeof(uint16_t), (size_t)(p * slot), (size_t)n * sizeof(uint16_t));
    }
    return true;
}

bool cache::read_rows(int32_t il, bool is_value, int32_t head, int32_t n_cells, uint16_t *rows) const {
    return move_rows(il, is_value, head, n_cells, [rows](ggml_tensor *window, size_t offset, size_t at, size_t bytes) {
        ggml_backend_tensor_get(window, rows + at, offset, bytes);
    });
}

bool cache::write_rows(int32_t il, bool is_value, int32_t head, int32_t n_cells, const uint16_t *rows) const {
    return move_rows(il, is_value, head, n_cells, [rows](ggml_tensor *window, size_t offset, size_t at, size_t bytes) {
        ggml_backend_tensor_set(window, rows + at, offset, bytes);
    });
}

void cache::info(xquant_llama_info &out) const {
    out = {};
    int64_t page_blocks = 0, page_rows = 0; // bytes of one sealed and of one open page, all layers
    for (const auto &l : layers_) {
        out.bytes_allocated += (int64_t)(ggml_nbytes(l->blocks) + ggml_nbytes(l->window));
        out.bytes_allocated += l->map ? (int64_t)(l->map->weight.size() * sizeof(float)) : 0;
        out.bytes_allocated += l->extra ? (int64_t)ggml_nbytes(l->extra) : 0;
        page_blocks += l->block_stride() * l->n_head_kv;
        page_rows += (l->k_slot() + l->v_slot()) * l->n_head_kv * (int64_t)sizeof(ggml_fp16_t);
    }
    for (uint32_t s = 0; s < n_streams; ++s) {
        const stream &st = streams[s];
        out.bytes_allocated += (int64_t)(st.pages.size() * sizeof(page) + (size_t)n_slots * sizeof(int32_t));
        for (int32_t p = 0; p < n_pages; ++p) {
            if (st.pages[p].state == page_free || !has_cells(s, p)) {
                out.pages_free++;
            } else if (st.pages[p].state == page_sealed) {
                out.pages_sealed++;
            } else {
                out.pages_open++;
            }
        }
    }
    out.bytes_used = out.pages_sealed * page_blocks + out.pages_open * page_rows;
    out.n_nonfinite = (int64_t)count_nonfinite();
    out.page_tokens = XQ_PAGE;
    out.n_slots = n_slots;
    out.n_streams = (int32_t)n_streams;
    out.n_layers = plan_.n_layers;
    out.window = plan_.window;
    out.pinned = plan_.pinned;
    out.expected_kld = kv.model.xq->rules() ? kv.model.xq->expected_kld : -1.0;
}

void cache::plan(xq_plan &out, int32_t *d, int32_t *e, int32_t *n_head_kv) const {
    out = plan_;
    std::fill(n_head_kv, n_head_kv + XQ_MAX_LAYERS, 0);
    std::copy(d_.begin(), d_.end(), d);
    std::copy(e_.begin(), e_.end(), e);
    for (const auto &l : layers_) {
        n_head_kv[l->il] = l->n_head_kv;
    }
}

} // namespace xquant
