/* xquant-plan.cpp: which contexts may have an XQuant cache, and the plan that theirs follows.
 *
 * Precedence: the plan that a provider gives (xquant_llama_set_plan_provider), a preset that kv_overrides name, the
 * plan of the model's file, the default preset.  A preset is laid over the layers that the cache holds, in order.
 */
#include "xquant-kv-cache.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace xquant {

static thread_local std::string last_error;
static thread_local xquant_llama_plan_fn provider = nullptr;
static thread_local void *provider_data = nullptr;

void refuse(const std::string &reason) {
    last_error = reason;
    throw std::runtime_error("xquant: " + reason);
}

/* ---- what is refused ---- */

static bool is_ours(const llama_memory_params &params) {
    return params.type_k == GGML_TYPE_XQUANT || params.type_v == GGML_TYPE_XQUANT;
}

void refuse_model(const llama_model &model, const std::string &why, const std::string &instead) {
    refuse("architecture " + model.arch_name() + " cannot use it: " + why + "; use the cache type " + instead +
           " instead");
}

void check_context(const llama_model &model, const llama_memory_params &params, const llama_cparams &cparams) {
    last_error.clear();
    if (!is_ours(params)) {
        return;
    }
    if (params.type_k != params.type_v) {
        refuse("cache types K and V must both be xquant, or neither");
    }
    if (!cparams.flash_attn) {
        if (model.arch == LLM_ARCH_GROK) {
            refuse_model(model, "it cannot use flash attention");
        }
        refuse("it needs flash attention: do not switch it off (flash_attn=True, -fa on)");
    }
    if (!xq_kernels()) {
        refuse(xq_error());
    }
}

void check_type(const llama_model &model, ggml_type type_k) {
    if (type_k == GGML_TYPE_XQUANT) {
        refuse_model(model, model.hparams.indexer_head_size > 0
                                ? "its sparse attention has an indexer, which keeps keys of its own"
                                : "it has a cache of its own kind");
    }
}

void check_memory(const llama_model &model, const llama_memory_params &params, std::unique_ptr<llama_memory_i> memory) {
    llama_memory_i *made = memory.get();
    if (!is_ours(params) || kv_cache_of(made)) {
        memory.release();
        return;
    }
    if (!made) {
        refuse_model(model, "it is an encoder and keeps no keys and values");
    }
    if (dynamic_cast<llama_memory_recurrent *>(made)) {
        refuse_model(model, "it keeps a recurrent state instead of keys and values");
    }
    refuse_model(model, "it has a memory of its own kind");
}

/* ---- plan ---- */

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

static void lay_preset(const char *name, const int32_t *d, int32_t n_layers, xq_plan &plan) {
    std::vector<int32_t> held; // model layers that the cache holds
    for (int32_t il = 0; il < n_layers; ++il) {
        if (d[il] > 0) {
            held.push_back(il);
        }
    }
    auto named = std::make_unique<xq_plan>();
    if (xq_plan_preset(name, (int32_t)held.size(), named.get()) != XQ_OK) {
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

static void lay_file(const metadata &file, const char *remedy, int32_t n_layers, xq_plan &plan) {
    if (!file.error.empty()) {
        refuse(file.error + remedy);
    }
    if ((int32_t)file.layers.size() != n_layers) {
        refuse("xquant.k.bits is " + std::to_string(file.layers.size()) + " entries long, must be " +
               std::to_string(n_layers) + remedy);
    }
    plan.n_layers = n_layers;
    plan.window = file.window;
    plan.pinned = file.pinned;
    plan.open_bits = file.open_bits;
    std::copy(file.layers.begin(), file.layers.end(), plan.layers);
}

/* What kv_overrides change. */
static void lay_overrides(const std::map<std::string, std::string> &given, xq_plan &plan) {
    for (const auto &[key, value] : given) {
        if (key == "xquant.window") {
            plan.window = (int32_t)parse_integer(key, value, -1, INT32_MAX);
        } else if (key == "xquant.pinned") {
            plan.pinned = (int32_t)parse_integer(key, value, 0, 1 << 20);
        } else if (key == "xquant.open_bits") {
            plan.open_bits = (int32_t)parse_integer(key, value, 8, 16);
        } else if (key != "xquant.preset") {
            refuse("kv_overrides: " + key +
                   " is unknown; there are xquant.preset, xquant.window, xquant.pinned and xquant.open_bits");
        }
    }
}

/* Every map of the plan must fit the heads that it joins. */
static void check_maps(const metadata &file, const int32_t *e, const int32_t *n_head_kv, const xq_plan &plan) {
    for (int32_t il = 0; il < plan.n_layers; ++il) {
        const int32_t source = plan.layers[il].v.source;
        if (e[il] == 0 || source < 0) {
            continue;
        }
        const std::string key = "xquant.map." + std::to_string(il);
        const auto found = file.maps.find(il);
        if (found == file.maps.end()) {
            refuse(key + ".weight is missing: layer " + std::to_string(il) + " is mapped from layer " +
                   std::to_string(source));
        }
        const value_map &map = found->second;
        const size_t heads = (size_t)n_head_kv[il], source_heads = (size_t)n_head_kv[source];
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

/* Every transform must fit the keys of a layer whose codes are its own and nobody else's, and which holds no values. */
static void check_transforms(const llama_model &model, const metadata &file, const int32_t *d, const int32_t *e,
                             const int32_t *n_head_kv, const xq_plan &plan) {
    for (const auto &[il, weight] : file.transforms) {
        const std::string key = "xquant.transform." + std::to_string(il) + ".weight";
        const xq_side &side = plan.layers[il].k;
        if (d[il] == 0 || e[il] != (int32_t)model.hparams.n_embd_head_v((uint32_t)il)) {
            refuse(key + ": layer " + std::to_string(il) + " must have keys of its own in the cache, without values");
        }
        const size_t wanted = (size_t)n_head_kv[il] * (size_t)d[il] * (size_t)d[il];
        if (weight.size() != wanted) {
            refuse(key + " is " + std::to_string(weight.size()) + " entries long, must be " + std::to_string(wanted));
        }
        if (side.rotate) {
            refuse(key + ": xquant.k.rotate[" + std::to_string(il) + "] is true, must be false");
        }
        const bool borrowed = std::any_of(plan.layers, plan.layers + plan.n_layers,
                                          [il = il](const xq_layer &other) { return other.k.owner == il; });
        if (side.owner >= 0 || borrowed) {
            refuse(key + ": layer " + std::to_string(il) + " must neither borrow codes of keys nor lend them");
        }
    }
}

/* The weights of a norm make some channels of keys large, and so does a bias: spread over all channels that would take
 * the range of their codes, unless it is known (xquant-rotation.h).  Latent rows and those that hold values are read
 * channel by channel. */
static bool may_rotate_keys(const llama_model &model, int32_t il, int32_t e) {
    return !model.layers.at((size_t)il).attn_k_norm && e == (int32_t)model.hparams.n_embd_head_v((uint32_t)il) &&
           (!has_key_bias(model, il) || !factors_of_keys(model, il).empty());
}

/* The plan that a provider gives; null: there is no provider, or it leaves the choice to us. */
static std::shared_ptr<const metadata> provided(int32_t n_layers, const int32_t *d, const int32_t *e,
                                                const int32_t *n_head_kv) {
    const void *block = nullptr;
    size_t size = 0;
    const int32_t status = provider ? provider(provider_data, n_layers, d, e, n_head_kv, &block, &size) : 0;
    if (status < 0) {
        refuse("the provider of the plan failed");
    }
    return status > 0 ? std::make_shared<metadata>(read_plan(block, size)) : nullptr;
}

std::shared_ptr<const metadata> resolve_plan(const llama_model &model, const int32_t *d, const int32_t *e,
                                             const int32_t *n_head_kv, xq_plan &plan) {
    const model_metadata &file = *model.xq;
    const int32_t n_layers = (int32_t)model.hparams.n_layer_all;
    const auto preset = file.given.find("xquant.preset");
    auto out = provided(n_layers, d, e, n_head_kv);
    if (out) {
        lay_file(*out, "", n_layers, plan);
    } else if (preset == file.given.end() && file.plan->present) {
        out = file.plan;
        lay_file(*out, "; remove the plan with xquant-gguf strip, or name a preset", n_layers, plan);
    } else {
        out = std::make_shared<metadata>();
        lay_preset(preset == file.given.end() ? "xquant" : preset->second.c_str(), d, n_layers, plan);
    }
    for (int32_t il = 0; il < n_layers; ++il) {
        if (d[il] > 0 && e[il] == 0) { // nothing is stored of V
            plan.layers[il].v = {};
            plan.layers[il].v.owner = plan.layers[il].v.source = -1;
        }
        plan.layers[il].k.rotate = plan.layers[il].k.rotate && d[il] > 0 && may_rotate_keys(model, il, e[il]);
    }
    lay_overrides(file.given, plan);
    if (xq_plan_check(&plan, d, e) != XQ_OK) {
        refuse(xq_error());
    }
    check_maps(*out, e, n_head_kv, plan);
    check_transforms(model, *out, d, e, n_head_kv, plan);
    return out;
}

} // namespace xquant

const char *xquant_llama_error(void) {
    return xquant::last_error.c_str();
}

void xquant_llama_set_plan_provider(xquant_llama_plan_fn function, void *data) {
    xquant::provider = function;
    xquant::provider_data = data;
}
