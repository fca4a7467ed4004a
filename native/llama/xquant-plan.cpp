/* xquant-plan.cpp: from a model's metadata and kv_overrides to the plan of its cache, and what is refused.
 *
 * A preset is laid over the layers that the cache holds, in order; xquant.layer.N then replaces model layer N.
 */
#include "xquant-cache.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <cstdlib>
#include <stdexcept>

namespace xquant {

static thread_local std::string last_error;
static thread_local uint32_t last_n_ubatch = 512;

void refuse(const std::string &reason) {
    last_error = reason;
    throw std::runtime_error("xquant: " + reason);
}

uint32_t announced_n_ubatch() {
    return last_n_ubatch;
}

void keep_overrides(const std::unordered_map<std::string, llama_model_kv_override> &overrides,
                    std::unordered_map<std::string, std::string> &metadata) {
    for (const auto &[key, value] : overrides) {
        if (key.rfind("xquant.", 0) != 0) {
            continue;
        }
        switch (value.tag) {
        case LLAMA_KV_OVERRIDE_TYPE_INT:
            metadata[key] = std::to_string(value.val_i64);
            break;
        case LLAMA_KV_OVERRIDE_TYPE_STR:
            metadata[key] = std::string(value.val_str, strnlen(value.val_str, sizeof(value.val_str)));
            break;
        default:
            throw std::runtime_error("kv_overrides: " + key + " must be a string or an integer");
        }
    }
}

/* Architectures that make a memory of their own kind; everything else gets a KV cache of one vector a token. */
static const char *unsupported(const llama_model &model) {
    switch (model.arch) {
    case LLM_ARCH_MINIMAX_M3:
    case LLM_ARCH_GLM_DSA:
    case LLM_ARCH_DEEPSEEK32:
    case LLM_ARCH_GLM5_NEXT:
    case LLM_ARCH_HY_V4:
    case LLM_ARCH_DOTS3NOTE:
    case LLM_ARCH_DEEPSEEK4:
    case LLM_ARCH_DFLASH:
    case LLM_ARCH_GEMMA4_ASSISTANT:
        return "it has a cache of its own kind";
    case LLM_ARCH_T5:
    case LLM_ARCH_T5ENCODER:
        return "it is an encoder, or its attention has a position bias";
    case LLM_ARCH_GROK:
        return "it cannot use flash attention";
    default:
        break;
    }
    if (llm_arch_is_recurrent(model.arch)) {
        return "it keeps a recurrent state instead of keys and values";
    }
    if (llm_arch_is_hybrid(model.arch)) {
        return "it mixes recurrent states with keys and values";
    }
    if (model.hparams.is_mla()) {
        return "its attention is MLA, which stores latent vectors instead of keys and values";
    }
    if (!model.hparams.causal_attn) {
        return "it is an encoder and keeps no keys and values";
    }
    return nullptr;
}

void announce(const llama_model &model, const llama_memory_params &params, const llama_cparams &cparams) {
    last_error.clear();
    last_n_ubatch = cparams.n_ubatch;
    const bool k = params.type_k == GGML_TYPE_XQUANT, v = params.type_v == GGML_TYPE_XQUANT;
    if (!k && !v) {
        return;
    }
    if (k != v) {
        refuse("cache types K and V must both be xquant, or neither");
    }
    if (const char *why = unsupported(model)) {
        refuse(std::string("architecture ") + llm_arch_name(model.arch) + " cannot use it: " + why +
               "; use the cache type f16 or q8_0 instead");
    }
    if (!cparams.flash_attn) {
        refuse("it needs flash attention: do not switch it off (flash_attn=True, -fa on)");
    }
    if (!xq_kernels()) {
        refuse(xq_error());
    }
}

static int64_t parse_integer(const std::string &key, const std::string &text, int64_t low, int64_t high) {
    char *end = nullptr;
    errno = 0;
    const long long value = strtoll(text.c_str(), &end, 10);
    if (text.empty() || *end != '\0' || errno != 0 || value < low || value > high) {
        refuse(key + " = \"" + text + "\" must be an integer from " + std::to_string(low) + " to " +
               std::to_string(high));
    }
    return value;
}

void resolve_plan(const llama_model &model, const int32_t *d, const int32_t *e, xq_plan &plan) {
    const auto &metadata = model.gguf_kv;
    const int32_t n_layers = (int32_t)model.hparams.n_layer_all;

    std::vector<int32_t> held; /* model layers that the cache holds */
    for (int32_t il = 0; il < n_layers; ++il) {
        if (d[il] > 0) {
            held.push_back(il);
        }
    }

    const auto preset = metadata.find("xquant.preset");
    auto named = std::make_unique<xq_plan>();
    if (xq_plan_preset(preset == metadata.end() ? "xquant" : preset->second.c_str(), (int32_t)held.size(),
                       named.get()) != XQ_OK) {
        refuse(std::string("xquant.preset: ") + xq_error());
    }

    plan = *named;
    plan.n_layers = n_layers;
    for (size_t i = 0; i < held.size(); ++i) {
        xq_layer &layer = plan.layers[held[i]];
        layer = named->layers[i];
        layer.k.owner = layer.k.owner < 0 ? -1 : held[layer.k.owner];
        layer.v.owner = layer.v.owner < 0 ? -1 : held[layer.v.owner];
    }

    const std::string prefix = "xquant.layer.";
    for (const auto &[key, value] : metadata) {
        if (key == "xquant.window") {
            plan.window = (int32_t)parse_integer(key, value, -1, INT32_MAX);
        } else if (key == "xquant.pinned") {
            plan.pinned = (int32_t)parse_integer(key, value, 0, 1 << 20);
        } else if (key.rfind(prefix, 0) == 0) {
            const auto il = parse_integer(key, key.substr(prefix.size()), 0, n_layers - 1);
            if (xq_layer_parse(value.c_str(), &plan.layers[il]) != XQ_OK) {
                refuse(key + ": " + xq_error());
            }
        }
    }

    if (xq_plan_check(&plan, d, e) != XQ_OK) {
        refuse(xq_error());
    }
}

} // namespace xquant

extern "C" const char *xquant_llama_error(void) {
    return xquant::last_error.c_str();
}
