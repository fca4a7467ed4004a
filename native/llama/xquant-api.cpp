/* xquant-api.cpp: what libllama exports beside llama.h; see xquant_llama.h. */
#include "xquant-cache.h"

#include "llama-context.h"
#include "llama-hparams.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"

namespace xquant {

/* The XQuant cache of a context, and the F16 cache of its sliding layers; null if it has none. */
static const cache *cache_of(const llama_context *ctx, const llama_kv_cache **other) {
    *other = nullptr;
    auto *memory = ctx ? ctx->get_memory() : nullptr;
    if (auto *both = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        *other = both->get_swa();
        return both->get_base()->xq.get();
    }
    auto *kv = dynamic_cast<llama_kv_cache *>(memory);
    return kv ? kv->xq.get() : nullptr;
}

} // namespace xquant

int xquant_llama_get_info(const llama_context *ctx, xquant_llama_info *info) {
    const llama_kv_cache *other;
    const auto *c = xquant::cache_of(ctx, &other);
    if (!c || !info) {
        return -1;
    }
    c->info(*info);
    if (other) {
        for (const auto &[type, bytes] : other->memory_breakdown()) {
            info->bytes_other += (int64_t)bytes;
        }
    }
    return 0;
}

int xquant_llama_get_plan(const llama_context *ctx, xq_plan *plan, int32_t *d, int32_t *e, int32_t *n_head_kv) {
    const llama_kv_cache *other;
    const auto *c = xquant::cache_of(ctx, &other);
    if (!c || !plan || !d || !e || !n_head_kv) {
        return -1;
    }
    c->plan(*plan, d, e, n_head_kv);
    return 0;
}

int xquant_llama_get_shapes(const llama_context *ctx, int32_t *d, int32_t *e, int32_t *n_head_kv, int64_t *bytes) {
    const auto &hparams = ctx->get_model().hparams;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        const bool has = hparams.has_kv(il);
        d[il] = has ? (int32_t)hparams.n_embd_head_k(il) : 0;
        e[il] = has ? (int32_t)hparams.n_embd_head_v(il) : 0;
        n_head_kv[il] = has ? (int32_t)hparams.n_head_kv(il) : 0;
    }
    *bytes = 0;
    if (auto *memory = ctx->get_memory()) {
        for (const auto &[type, size] : memory->memory_breakdown()) {
            *bytes += (int64_t)size;
        }
    }
    return (int)hparams.n_layer_all;
}

int xquant_llama_use_plan(llama_model *model, const char *path) {
    if (!model) {
        return -1;
    }
    const auto plan = path ? xquant::read_plan_file(path) : std::make_shared<const xquant::metadata>();
    if (plan) {
        model->xq = plan;
    }
    return plan ? 0 : -1;
}

int xquant_llama_read_rows(const llama_context *ctx, int32_t layer, int32_t is_value, int32_t head, int32_t n_cells,
                           uint16_t *rows) {
    const llama_kv_cache *other;
    const auto *c = xquant::cache_of(ctx, &other);
    return c && rows && c->read_rows(layer, is_value != 0, head, n_cells, rows) ? 0 : -1;
}

int xquant_llama_write_rows(llama_context *ctx, int32_t layer, int32_t is_value, int32_t head, int32_t n_cells,
                            const uint16_t *rows) {
    const llama_kv_cache *other;
    const auto *c = xquant::cache_of(ctx, &other);
    return c && rows && c->write_rows(layer, is_value != 0, head, n_cells, rows) ? 0 : -1;
}
