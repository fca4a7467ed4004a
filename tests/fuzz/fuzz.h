/* fuzz.h: what the fuzz targets share: tiny models, contexts, checks. */
#pragma once

#include "xquant-metadata.h"
#include "xquant_llama.h"

#include "llama.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace fuzz {

inline void check(bool holds, const char *what) {
    if (!holds) {
        fprintf(stderr, "does not hold: %s\n", what);
        abort();
    }
}

inline void quiet() {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
}

/* A model of the folder that seed.py wrote; text: kv_overrides that are strings. */
inline llama_model *load_model(const std::string &name,
                               const std::vector<std::pair<std::string, std::string>> &text = {}) {
    const char *folder = getenv("XQUANT_FUZZ_MODELS");
    check(folder != nullptr, "XQUANT_FUZZ_MODELS names the folder that seed.py wrote");
    std::vector<llama_model_kv_override> overrides(text.size() + 1);
    for (size_t i = 0; i < text.size(); ++i) {
        overrides[i].tag = LLAMA_KV_OVERRIDE_TYPE_STR;
        snprintf(overrides[i].key, sizeof(overrides[i].key), "%s", text[i].first.c_str());
        snprintf(overrides[i].val_str, sizeof(overrides[i].val_str), "%s", text[i].second.c_str());
    }
    llama_model_params params = llama_model_default_params();
    params.kv_overrides = overrides.data();
    llama_model *model = llama_model_load_from_file((std::string(folder) + "/" + name + ".gguf").c_str(), params);
    check(model != nullptr, "the model loads");
    static auto &models = *new std::vector<llama_model *>; // kept: nothing leaks
    models.push_back(model);
    return model;
}

struct shape {
    uint32_t n_ctx, n_seq;
    bool unified;
};

/* One context with an XQuant cache; ctx is null if it was refused. */
struct context {
    context(llama_model *model, const shape &shape) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx = shape.n_ctx;
        params.n_batch = shape.n_ctx;
        params.n_ubatch = 32;
        params.n_seq_max = shape.n_seq;
        params.kv_unified = shape.unified;
        params.n_threads = params.n_threads_batch = 1;
        params.type_k = params.type_v = GGML_TYPE_XQUANT;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        params.swa_full = false;
        ctx = llama_init_from_model(model, params);
    }
    ~context() { llama_free(ctx); }
    context(const context &) = delete;
    context &operator=(const context &) = delete;

    /* llama_decode of n tokens of one sequence, from a position on. */
    int decode(llama_seq_id sequence, llama_pos first, int n) {
        llama_batch batch = llama_batch_init(n, 0, 1);
        batch.n_tokens = n;
        for (int i = 0; i < n; ++i) {
            batch.token[i] = 3 + (first + 7 * i) % 250;
            batch.pos[i] = first + i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = sequence;
            batch.logits[i] = i + 1 == n;
        }
        const int code = llama_decode(ctx, batch);
        llama_batch_free(batch);
        return code;
    }

    /* The state of a sequence, or of the whole cache. */
    std::vector<uint8_t> save(llama_seq_id sequence = -1) {
        const bool whole = sequence < 0;
        std::vector<uint8_t> state(whole ? llama_state_get_size(ctx) : llama_state_seq_get_size(ctx, sequence));
        const size_t n = whole ? llama_state_get_data(ctx, state.data(), state.size())
                               : llama_state_seq_get_data(ctx, state.data(), state.size(), sequence);
        check(n == state.size(), "a state is as long as it says");
        return state;
    }

    llama_context *ctx;
};

} // namespace fuzz
