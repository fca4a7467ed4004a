/* xquant-api.cpp: what libllama exports beside llama.h; see xquant_llama.h. */
#include "xquant-kv-cache.h"

#include "ggml-backend.h"
#include "llama-arch.h"
#include "llama-context.h"
#include "llama-ext.h"
#include "llama-hparams.h"
#include "llama-model.h"

#include <cstdio>
#include <cstring>

using namespace xquant;

static kv_cache *cache_of(const llama_context *ctx) {
    return ctx ? kv_cache_of(ctx->get_memory()) : nullptr;
}

static int64_t bytes_of(const llama_memory_i &memory) {
    int64_t bytes = 0;
    for (const auto &[type, size] : memory.memory_breakdown()) {
        bytes += (int64_t)size;
    }
    return bytes;
}

int xquant_llama_get_info(const llama_context *ctx, xquant_llama_info *info) {
    const kv_cache *cache = cache_of(ctx);
    if (!cache || !info) {
        return -1;
    }
    cache->info(*info);
    info->bytes_other = bytes_of(*ctx->get_memory()) - bytes_of(*cache);
    return 0;
}

int xquant_llama_get_plan(const llama_context *ctx, xq_plan *plan, int32_t *d, int32_t *e, int32_t *n_head_kv) {
    const kv_cache *cache = cache_of(ctx);
    if (!cache || !plan || !d || !e || !n_head_kv) {
        return -1;
    }
    cache->plan(*plan, d, e, n_head_kv);
    return 0;
}

int xquant_llama_get_shapes(const llama_context *ctx, int32_t *d, int32_t *e, int32_t *n_head_kv, int64_t *bytes) {
    if (!ctx || !d || !e || !n_head_kv || !bytes) {
        return -1;
    }
    const auto &hparams = ctx->get_model().hparams;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        // of hybrids one alone has attention in its recurrent layers
        const bool has = hparams.has_kv(il) && (!hparams.is_recr(il) || ctx->get_model().arch == LLM_ARCH_FALCON_H1);
        d[il] = has ? (int32_t)hparams.n_embd_head_k(il) : 0;
        e[il] = has && !hparams.is_mla() ? (int32_t)hparams.n_embd_head_v(il) : 0;
        n_head_kv[il] = has ? (int32_t)hparams.n_head_kv(il) : 0;
    }
    *bytes = ctx->get_memory() ? bytes_of(*ctx->get_memory()) : 0;
    return (int)hparams.n_layer_all;
}

int64_t xquant_llama_get_compute_bytes(const llama_context *ctx) {
    if (!ctx) {
        return -1;
    }
    int64_t bytes = 0;
    for (const auto &[type, size] : ctx->memory_breakdown()) {
        bytes += (int64_t)size.compute;
    }
    return bytes;
}

int32_t xquant_llama_get_pages(const llama_context *ctx, int32_t stream, int32_t n, xquant_llama_page *pages) {
    const kv_cache *cache = cache_of(ctx);
    return cache && stream >= 0 && n >= 0 && (pages || n == 0) ? cache->pages((uint32_t)stream, n, pages) : -1;
}

int xquant_llama_read_rows(llama_context *ctx, int32_t layer, int32_t is_value, int32_t head, int32_t n_cells,
                           uint16_t *rows) {
    const kv_cache *cache = cache_of(ctx);
    if (!cache || !rows) {
        return -1;
    }
    ctx->synchronize();
    return cache->read_rows(layer, is_value != 0, head, n_cells, rows) ? 0 : -1;
}

int xquant_llama_write_rows(llama_context *ctx, int32_t layer, int32_t is_value, int32_t head, int32_t n_cells,
                            const uint16_t *rows) {
    const kv_cache *cache = cache_of(ctx);
    if (!cache || !rows) {
        return -1;
    }
    ctx->synchronize();
    return cache->write_rows(layer, is_value != 0, head, n_cells, rows) ? 0 : -1;
}

bool xquant_llama_add_moments(ggml_tensor *node, bool ask, void *moments) {
    int il = -1;
    if (node->op != GGML_OP_XQUANT_ATTEND || sscanf(node->name, "xquant_attend-%d", &il) != 1 || il < 0 ||
        il >= XQ_MAX_LAYERS) {
        return !ask; // go on
    }
    double *sums = ((const xquant_llama_moments *)moments)->sums[il];
    const ggml_tensor *q = node->src[attend_q]; // F32 [d, head, token]
    if (ask || !sums || !ggml_backend_buffer_is_host(q->buffer)) {
        return !ask || sums;
    }
    node_params params;
    memcpy(&params, node->op_params, sizeof(params));
    const int64_t d = q->ne[0], n_rep = q->ne[1] / params.n_head_kv;
    for (int64_t t = 0; t < q->ne[2]; ++t) {
        for (int64_t h = 0; h < q->ne[1]; ++h) {
            const auto *row = (const float *)((const char *)q->data + h * q->nb[1] + t * q->nb[2]);
            double *sum = sums + h / n_rep * d * d;
            for (int64_t i = 0; i < d; ++i) {
                for (int64_t j = 0; j < d; ++j) {
                    sum[i * d + j] += row[i] * row[j];
                }
            }
        }
    }
    return true;
}
