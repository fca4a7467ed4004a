/* xquant-rotation.cpp: what channels of keys are multiplied by before a Hadamard matrix mixes them.
 *
 * Codes change channel j of a key by a share of its variance within a page, and a score by q_j as much.  Mixed, all
 * channels change alike, which costs where a few of them vary much and queries are small there: so they are brought to
 * the size at which both are alike,
 *
 *     s_j = (E(q_j^2) / var(k_j))^(1/4)
 *
 * A bias makes such channels, and is known without data.  RoPE turns it with the position, by an angle t a token for a
 * pair of channels; a slow pair hardly moves within a page, whose offset takes what does not.  For a pair, with N the
 * tokens n of a page and the variance of all else taken to be `others`,
 *
 *     spread(t) = 1 - |mean of e^(i t n)|^2 = 1 - (sin(N t / 2) / (N sin(t / 2)))^2
 *     var(k) = others + b_k^2 spread(t)        E(q^2) = others + b_q^2, over the query heads of the KV head
 */
#include "xquant-rotation.h"

#include "xquant.h"

#include "llama-model.h"

#include <algorithm>
#include <bitset>
#include <cmath>

namespace xquant {

/* What queries and keys have of variance beside their bias, in models that were looked at: 0.1 to 1.8. */
static constexpr float others = 0.5f;

bool has_key_bias(const llama_model &model, int32_t il) {
    const auto &layer = model.layers.at((size_t)il);
    return layer.wk_b || layer.wqkv_b;
}

/* b^2 [head][d] of a bias; zeros: there is none.  False: it is not known. */
static bool squares_of(const llama_model &model, int32_t il, const char *name, const ggml_tensor *tensor, size_t n,
                       std::vector<float> &out) {
    out.assign(n, 0.0f);
    const auto found = model.xq->vectors.find("blk." + std::to_string(il) + name);
    if (!tensor) {
        return true;
    }
    if (found == model.xq->vectors.end() || found->second.size() != n) {
        return false;
    }
    std::transform(found->second.begin(), found->second.end(), out.begin(), [](float b) { return b * b; });
    return std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); });
}

/* angle: above 0, at most 1. */
static float spread_of(double angle) {
    const double mean = std::sin(XQ_PAGE * angle / 2.0) / (XQ_PAGE * std::sin(angle / 2.0));
    return (float)(1.0 - mean * mean);
}

std::vector<float> factors_of_keys(const llama_model &model, int32_t il) {
    const auto &hparams = model.hparams;
    const auto &layer = model.layers.at((size_t)il);
    const size_t d = hparams.n_embd_head_k((uint32_t)il), n_head = hparams.n_head((uint32_t)il),
                 n_head_kv = hparams.n_head_kv((uint32_t)il), n_rep = n_head / n_head_kv;
    std::vector<float> k, q;
    if (layer.wqkv_b || !squares_of(model, il, ".attn_k.bias", layer.wk_b, n_head_kv * d, k) ||
        !squares_of(model, il, ".attn_q.bias", layer.wq_b, n_head * d, q)) {
        return {};
    }
    const size_t n_pairs = std::min<size_t>(hparams.n_rot((uint32_t)il), d) / 2;
    const bool side_by_side = hparams.rope_type == LLAMA_ROPE_TYPE_NORM;
    std::vector<float> out(n_head_kv * d, 1.0f);
    for (size_t pair = 0; pair < n_pairs; ++pair) {
        const size_t first = side_by_side ? 2 * pair : pair, second = side_by_side ? first + 1 : pair + n_pairs;
        const double angle = std::pow((double)hparams.rope_freq_base_train, -(double)pair / (double)n_pairs);
        const float spread = hparams.rope_type == LLAMA_ROPE_TYPE_NONE ? 0.0f : spread_of(angle);
        for (size_t h = 0; h < n_head_kv; ++h) {
            const auto mean = [&](const std::vector<float> &squares, size_t head) {
                return 0.5f * (squares[head * d + first] + squares[head * d + second]);
            };
            float of_queries = others;
            for (size_t r = 0; r < n_rep; ++r) {
                of_queries += mean(q, h * n_rep + r) / (float)n_rep;
            }
            const float factor = std::sqrt(std::sqrt(of_queries / (others + mean(k, h) * spread)));
            out[h * d + first] = out[h * d + second] = factor;
        }
    }
    return out;
}

std::vector<float> factors_of_queries(const std::vector<float> &of_keys, int64_t n_head, int64_t n_head_kv, int64_t d) {
    std::vector<float> out((size_t)(n_head * d));
    for (int64_t i = 0; i < n_head * d; ++i) {
        out[(size_t)i] = 1.0f / of_keys[(size_t)(i / d / (n_head / n_head_kv) * d + i % d)];
    }
    return out;
}

/* The sign is the parity of the bits that row and column share. */
std::vector<float> hadamard_matrix(int64_t n) {
    std::vector<float> matrix((size_t)(n * n));
    for (int64_t i = 0; i < n * n; ++i) {
        const bool is_minus = std::bitset<32>((uint32_t)(i / n & i % n)).count() % 2 == 1;
        matrix[(size_t)i] = (is_minus ? -1.0f : 1.0f) / std::sqrt((float)n);
    }
    return matrix;
}

} // namespace xquant
