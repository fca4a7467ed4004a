/* xquant-server.h: what llama-server tells of an XQuant cache: gauges of /metrics, and the plan in /props.
 *
 * llama-server answers requests for metrics while another thread decodes.  The cache's numbers are therefore read
 * between decodes, now and then, and kept with the server's own metrics, of which an answer gets a copy. */
#pragma once

#include "xquant_llama.h"

#include "ggml.h"

#include <memory>
#include <vector>

namespace xquant {

/* What the cache held after a decode, no more than a second ago: counters of a GPU are waited for. */
class server_numbers {
  public:
    void read(const llama_context *ctx) {
        const int64_t now = ggml_time_ms();
        if (read_at_ < 0 || now - read_at_ >= 1000) {
            present_ = xquant_llama_get_info(ctx, &info_) == 0;
            read_at_ = now;
        }
    }
    /* Items of name, description and value; none without an XQuant cache. */
    template <class Item> std::vector<Item> gauges() const {
        if (!present_) {
            return {};
        }
        return {
            {"xquant_bytes_allocated", "Bytes of the XQuant cache", (double)info_.bytes_allocated},
            {"xquant_bytes_used", "Bytes of the XQuant cache that hold tokens", (double)info_.bytes_used},
            {"xquant_bytes_other", "Bytes of the F16 cache of sliding layers", (double)info_.bytes_other},
            {"xquant_pages_open", "Pages of 128 tokens that are F16 or bytes", (double)info_.pages_open},
            {"xquant_pages_bytes", "Pages of 128 tokens that are bytes", (double)info_.pages_bytes},
            {"xquant_pages_sealed", "Pages of 128 tokens that are codes", (double)info_.pages_sealed},
            {"xquant_pages_free", "Pages of 128 tokens that hold nothing", (double)info_.pages_free},
            {"xquant_nonfinite", "Keys and values seen that were not finite", (double)info_.n_nonfinite},
        };
    }

  private:
    bool present_ = false;
    int64_t read_at_ = -1;
    xquant_llama_info info_ = {};
};

/* The plan in force by layer of the model; null without an XQuant cache. */
template <class Json> Json server_plan(const llama_context *ctx) {
    auto plan = std::make_unique<xq_plan>();
    std::vector<int32_t> d(XQ_MAX_LAYERS), e(XQ_MAX_LAYERS), heads(XQ_MAX_LAYERS);
    xquant_llama_info info;
    if (xquant_llama_get_plan(ctx, plan.get(), d.data(), e.data(), heads.data()) != 0 ||
        xquant_llama_get_info(ctx, &info) != 0) {
        return nullptr;
    }
    Json layers = Json::array();
    for (int32_t l = 0; l < plan->n_layers; ++l) {
        if (d[l] > 0) {
            // null: values are channels of the keys
            const Json v_bits = e[l] > 0 ? Json(plan->layers[l].v.bits) : Json(nullptr);
            layers.push_back({{"layer", l}, {"k_bits", plan->layers[l].k.bits}, {"v_bits", v_bits}});
        }
    }
    Json out = {{"window", plan->window},
                {"pinned", plan->pinned},
                {"open_bits", plan->open_bits},
                {"bytes", info.bytes_allocated}};
    out["expected_kld"] = info.expected_kld < 0 ? Json(nullptr) : Json(info.expected_kld);
    out["kernels"] = xq_kernels();
    out["layers"] = layers;
    return out;
}

} // namespace xquant
