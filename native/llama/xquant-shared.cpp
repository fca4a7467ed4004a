/* xquant-shared.cpp: layers without a projection of values, whose keys hold most of them (Gemma 4).
 *
 *     u = rms_norm(x W_k)        V = u        K = RoPE(w * u)
 *
 * RoPE turns the first r pairs (i, d/2 + i) of a key's channels alone: frequency factors keep the others where they
 * are.  So V_i = K_i / w_i for all other channels, at any position.  What is stored:
 *
 *     K: [r .. d/2) [d/2 + r .. d) [0 .. r) [d/2 .. d/2 + r)        V: [0 .. r) [d/2 .. d/2 + r)
 */
#include "xquant-shared.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>

namespace xquant {

/* Frequency factors from which on nothing is turned at any position; 1e30 in files. */
static constexpr float turns_nothing = 1e20f;
/* Smaller weights would cost values what F16 has of precision. */
static constexpr float least_weight = 1.0f / 256.0f;

static const std::vector<float> *vector_of(const llama_model &model, const std::string &name, size_t n) {
    const auto found = model.xq->vectors.find(name);
    return found != model.xq->vectors.end() && found->second.size() == n ? &found->second : nullptr;
}

int32_t turned_pairs(const llama_model &model, int32_t il) {
    const auto &hparams = model.hparams;
    const auto &layer = model.layers.at((size_t)il);
    const auto width = (int32_t)hparams.n_embd_head_k((uint32_t)il);
    if (model.arch != LLM_ARCH_GEMMA4 || layer.wv || layer.wqkv || hparams.is_swa((uint32_t)il) ||
        (int32_t)hparams.n_rot((uint32_t)il) != width || width % 32 != 0) {
        return -1;
    }
    const auto *factors = vector_of(model, "rope_freqs.weight", (size_t)width / 2);
    const auto *weights = vector_of(model, "blk." + std::to_string(il) + ".attn_k_norm.weight", (size_t)width);
    if (!factors || !weights || !std::all_of(weights->begin(), weights->end(), [](float w) {
            return std::isfinite(w) && std::fabs(w) >= least_weight;
        })) {
        return -1;
    }
    const auto still = [](float factor) { return factor >= turns_nothing; };
    const auto first = std::find_if(factors->begin(), factors->end(), still);
    if (!std::all_of(first, factors->end(), still)) {
        return -1;
    }
    const auto turned = (int32_t)(first - factors->begin() + 7) / 8 * 8; // whole blocks of 16 channels
    return 2 * turned < width ? turned : -1;
}

/* Channels first .. first + n - 1 of x [width, n, n]. */
static ggml_tensor *channels(ggml_context *ctx, ggml_tensor *x, int64_t first, int64_t n) {
    return ggml_view_3d(ctx, x, n, x->ne[1], x->ne[2], x->nb[1], x->nb[2], (size_t)first * x->nb[0]);
}

ggml_tensor *turned_channels(ggml_context *ctx, ggml_tensor *x, int64_t turned) {
    return ggml_concat(ctx, channels(ctx, x, 0, turned), channels(ctx, x, x->ne[0] / 2, turned), 0);
}

ggml_tensor *to_stored_order(ggml_context *ctx, ggml_tensor *x, int64_t turned) {
    const int64_t half = x->ne[0] / 2, n = half - turned;
    ggml_tensor *still = ggml_concat(ctx, channels(ctx, x, turned, n), channels(ctx, x, half + turned, n), 0);
    return ggml_concat(ctx, still, turned_channels(ctx, x, turned), 0);
}

/* low, high: channels of the two halves that are not turned. */
static ggml_tensor *in_order(ggml_context *ctx, ggml_tensor *x, ggml_tensor *low, ggml_tensor *high, int64_t turned) {
    const int64_t at = x->ne[0] - 2 * turned;
    ggml_tensor *first = ggml_concat(ctx, channels(ctx, x, at, turned), low, 0);
    return ggml_concat(ctx, first, ggml_concat(ctx, channels(ctx, x, at + turned, turned), high, 0), 0);
}

ggml_tensor *from_stored_order(ggml_context *ctx, ggml_tensor *x, int64_t turned) {
    const int64_t n = x->ne[0] / 2 - turned;
    return in_order(ctx, x, channels(ctx, x, 0, n), channels(ctx, x, n, n), turned);
}

ggml_tensor *shared_values(const llm_graph_context &graph, ggml_tensor *out, ggml_tensor *weight, int64_t turned) {
    ggml_context *ctx = graph.ctx0;
    const int64_t width = weight->ne[0], n = width / 2 - turned, n_tokens = out->ne[1];
    const auto &c = graph.cparams;
    // what RoPE multiplies all channels of a key with
    const float grown = c.yarn_ext_factor != 0.0f ? 1.0f + 0.1f * std::log(1.0f / c.rope_freq_scale) : 1.0f;
    const float factor = c.yarn_attn_factor * grown;
    ggml_tensor *x = ggml_reshape_3d(ctx, ggml_cont(ctx, out), width, out->ne[0] / width, n_tokens);
    const auto values = [&](int64_t from, int64_t channel) {
        ggml_tensor *w = ggml_view_1d(ctx, weight, n, (size_t)channel * weight->nb[0]);
        ggml_tensor *y = ggml_div(ctx, channels(ctx, x, from, n), w);
        return factor == 1.0f ? y : ggml_scale(ctx, y, 1.0f / factor);
    };
    ggml_tensor *all = in_order(ctx, x, values(0, turned), values(n, width / 2 + turned), turned);
    return ggml_reshape_2d(ctx, all, out->ne[0], n_tokens);
}

} // namespace xquant
