/* xquant-shared.h: layers without a projection of values, whose keys hold most of them: see xquant-shared.cpp. */
#pragma once

#include "llama-graph.h"

#include <cstdint>

struct llama_model;

namespace xquant {

/* Pairs of channels that RoPE turns in such a layer, rounded up to a multiple of 8; -1: it is another kind of layer. */
int32_t turned_pairs(const llama_model &model, int32_t il);

/* x [d, head, token] in the order that keys are stored in, and back. */
ggml_tensor *to_stored_order(ggml_context *ctx, ggml_tensor *x, int64_t turned);
ggml_tensor *from_stored_order(ggml_context *ctx, ggml_tensor *x, int64_t turned);
/* The channels of x that are stored as values: [2 turned, head, token]. */
ggml_tensor *turned_channels(ggml_context *ctx, ggml_tensor *x, int64_t turned);

/* What attention gives of such a layer, [d * head, token] in the stored order, to values in their own.  weight [d]: of
 * the norm of the layer's keys. */
ggml_tensor *shared_values(const llm_graph_context &graph, ggml_tensor *out, ggml_tensor *weight, int64_t turned);

} // namespace xquant
