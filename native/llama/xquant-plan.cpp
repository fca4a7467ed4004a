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

/* A preset, laid over the layers that the cache holds. */
static void lay_preset(const std::map<std::string, std::string> &given, const std::vector<int32_t> &held,
                       int32_t n_layers, xq_plan &plan) {
    const auto preset = given.find("xquant.preset");
    auto named = std::make_unique<xq_plan>();
    if (xq_plan_preset(preset == given.end() ? "xquant" : preset->second.c_str(), (int32_t)held.size(), named.get()) !=
        XQ_OK) {
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
}

/* What kv_overrides change. */
static void lay_overrides(const std::map<std::string, std::string> &given, int32_t n_layers, xq_plan &plan) {
    const std::string prefix = "xquant.layer.";
    for (const auto &[key, value] : given) {
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
}

/* Every map of the plan must fit the heads that it joins. */
static void check_maps(const llama_model &model, const int32_t *e, const xq_plan &plan) {
    for (int32_t il = 0; il < plan.n_layers; ++il) {
        const int32_t source = plan.layers[il].v.source;
        if (e[il] == 0 || source < 0) {
            continue;
        }
        const std::string key = "xquant.map." + std::to_string(il);
        const auto found = model.xq->maps.find(il);
        if (found == model.xq->maps.end()) {
            refuse(key + ".weight is missing: layer " + std::to_string(il) + " is mapped from layer " +
                   std::to_string(source));
        }
        const value_map &map = found->second;
        const size_t heads = model.hparams.n_head_kv(il), source_heads = model.hparams.n_head_kv(source);
        const size_t weights = heads * (size_t)e[il] * (size_t)e[il];
        if (map.heads.size() != heads || map.weight.size() != weights) {
            refuse(key + ".heads and .weight are " + std::to_string(map.heads.size()) + " and " +
                   std::to_string(map.weight.size()) + " entries long, must be " + std::to_string(heads) + " and " +
                   std::to_string(weights));
        }
        for (const int32_t head : map.heads) {
            if (head < 0 || (size_t)head >= source_heads) {
                refuse(key + ".heads has " + std::to_string(head) + ", must be 0 to " +
                       std::to_string((int)source_heads - 1));
            }
        }
    }
}

void resolve_plan(const llama_model &model, const int32_t *d, const int32_t *e, xq_plan &plan) {
    const metadata &file = *model.xq;
    const int32_t n_layers = (int32_t)model.hparams.n_layer_all;

    std::vector<int32_t> held; /* model layers that the cache holds */
    for (int32_t il = 0; il < n_layers; ++il) {
        if (d[il] > 0) {
            held.push_back(il);
        }
    }

    if (file.rules()) {
        if (!file.error.empty()) {
            refuse(file.error + "; remove the plan with xquant-gguf strip, or name a preset");
        }
        if ((int32_t)file.layers.size() != n_layers) {
            refuse("xquant.k.bits is " + std::to_string(file.layers.size()) + " entries long, must be " +
                   std::to_string(n_layers));
        }
        plan.n_layers = n_layers;
        plan.window = file.window;
        plan.pinned = file.pinned;
        std::copy(file.layers.begin(), file.layers.end(), plan.layers);
    } else {
        lay_preset(file.given, held, n_layers, plan);
    }
    lay_overrides(file.given, n_layers, plan);
    if (xq_plan_check(&plan, d, e) != XQ_OK) {
        refuse(xq_error());
    }
    check_maps(model, e, plan);
}

} // namespace xquant

extern "C" const char *xquant_llama_error(void) {
    return xquant::last_error.c_str();
}
