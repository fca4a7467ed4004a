/* xquant-rotation.h: keys times a Hadamard matrix H, and queries likewise:
 *
 *     k' = H (s k)        q' = H (q / s)        q' . k' = q . k
 *
 * s [d] of a KV head is 1, unless keys have a bias: see xquant-rotation.cpp.
 */
#pragma once

#include "ggml.h"

#include <cstdint>
#include <vector>

struct llama_model;

namespace xquant {

/* What channels of a layer's keys and queries are multiplied by first, F32 [d][KV head], [d][head]; null: 1. */
struct channel_factors {
    ggml_tensor *keys, *queries;
};

/* Whether s of a layer is not 1 everywhere. */
bool has_key_bias(const llama_model &model, int32_t il);
/* s [KV head][d] of a layer whose keys have a bias; empty: it is not known. */
std::vector<float> factors_of_keys(const llama_model &model, int32_t il);
/* Of queries: 1 / s [head][d] of each one's KV head. */
std::vector<float> factors_of_queries(const std::vector<float> &of_keys, int64_t n_head, int64_t n_head_kv, int64_t d);

/* Sylvester's Hadamard matrix [n][n], normalised. */
std::vector<float> hadamard_matrix(int64_t n);

} // namespace xquant
