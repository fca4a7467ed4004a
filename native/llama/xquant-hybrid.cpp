/* xquant-hybrid.cpp: models that mix attention with recurrent layers: our cache for the attention, llama.cpp's own
 * states for the recurrent layers.
 *
 * Of a state the attention's part comes first, and is refused as a whole; if the recurrent part is refused, both get
 * back what they held.
 */
#include "xquant-kv-cache.h"
#include "xquant-snapshot.h"

#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <optional>

namespace xquant {

namespace {

/* What a state with these flags holds of attention: of a partial one nothing, or what slides; null: nothing. */
llama_memory_i *attention_in(llama_kv_cache &cache, llama_state_seq_flags flags) {
    return (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0 ? &cache : nullptr;
}
llama_memory_i *attention_in(llama_kv_cache_iswa &cache, llama_state_seq_flags flags) {
    return (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0 ? (llama_memory_i *)&cache : cache.get_swa();
}

/* base: llama_memory_hybrid, or the one whose attention slides in some layers. */
template <typename base> class hybrid final : public base {
  public:
    using base::base;

    llama_memory_context_ptr init_batch(llama_batch_allocr &balloc, uint32_t n_ubatch, bool embd_all) override {
        return in_fewer_tokens(*kv_cache_of(this), balloc, n_ubatch,
                               [&](uint32_t n) { return base::init_batch(balloc, n, embd_all); });
    }

    void state_read(llama_io_read_i &io, llama_seq_id seq_id, llama_state_seq_flags flags) override {
        llama_memory_i *recurrent = base::get_mem_recr(), *attention = attention_in(*base::get_mem_attn(), flags);
        const snapshot before(*recurrent, seq_id, flags);
        std::optional<snapshot> attention_before;
        if (attention) {
            attention_before.emplace(*attention, seq_id, flags);
            base::get_mem_attn()->state_read(io, seq_id, flags); // if it is refused, nothing has changed
        }
        try {
            recurrent->state_read(io, seq_id, flags);
        } catch (...) {
            io.discard();
            before.restore(*recurrent);
            if (attention) {
                attention_before->restore(*attention);
            }
            throw;
        }
    }
};

/* The filter that llama.cpp takes where an architecture has none of its own. */
llama_memory_i::layer_filter_cb or_by_kind(const llama_model &model, const llama_memory_i::layer_filter_cb &filter,
                                           bool recurrent) {
    return filter ? filter
                  : [&hparams = model.hparams, recurrent](int32_t il) { return hparams.is_recr(il) == recurrent; };
}

} // namespace

llama_memory_hybrid *new_memory_hybrid(uint32_t n_ubatch, const llama_model &model, ggml_type type_k, ggml_type type_v,
                                       bool v_trans, uint32_t kv_size, uint32_t n_pad, uint32_t n_swa,
                                       llama_swa_type swa_type, ggml_type type_r, ggml_type type_s, uint32_t rs_size,
                                       uint32_t n_seq_max, uint32_t n_rs_seq, bool offload, bool unified,
                                       const llama_memory_i::layer_filter_cb &filter_attn,
                                       const llama_memory_i::layer_filter_cb &filter_recr) {
    if (type_k != GGML_TYPE_XQUANT) {
        return new llama_memory_hybrid(model, type_k, type_v, v_trans, kv_size, n_pad, n_swa, swa_type, type_r, type_s,
                                       rs_size, n_seq_max, n_rs_seq, offload, unified, filter_attn, filter_recr);
    }
    return new hybrid<llama_memory_hybrid>(
        model,
        make_kv_cache(n_ubatch, model, model.hparams, type_k, type_v, v_trans, offload, unified, kv_size, n_seq_max,
                      n_pad, n_swa, swa_type, nullptr, or_by_kind(model, filter_attn, false), nullptr, nullptr),
        std::make_unique<llama_memory_recurrent>(model, type_r, type_s, offload, rs_size, n_seq_max, n_rs_seq,
                                                 or_by_kind(model, filter_recr, true)));
}

llama_memory_hybrid_iswa *new_memory_hybrid_iswa(const llama_model &model, ggml_type type_k, ggml_type type_v,
                                                 bool v_trans, bool swa_full, uint32_t kv_size, uint32_t n_ubatch,
                                                 uint32_t n_pad, ggml_type type_r, ggml_type type_s, uint32_t rs_size,
                                                 uint32_t n_seq_max, uint32_t n_rs_seq, bool offload, bool unified,
                                                 const llama_memory_i::layer_filter_cb &filter_attn,
                                                 const llama_memory_i::layer_filter_cb &filter_recr) {
    if (type_k != GGML_TYPE_XQUANT) {
        return new llama_memory_hybrid_iswa(model, type_k, type_v, v_trans, swa_full, kv_size, n_ubatch, n_pad, type_r,
                                            type_s, rs_size, n_seq_max, n_rs_seq, offload, unified, filter_attn,
                                            filter_recr);
    }
    return new hybrid<llama_memory_hybrid_iswa>(
        model,
        std::unique_ptr<llama_kv_cache_iswa>(
            new_kv_cache_iswa(model, type_k, type_v, v_trans, offload, swa_full, unified, kv_size, n_seq_max, n_ubatch,
                              n_pad, nullptr, or_by_kind(model, filter_attn, false), nullptr, nullptr)),
        std::make_unique<llama_memory_recurrent>(model, type_r, type_s, offload, rs_size, n_seq_max, n_rs_seq,
                                                 or_by_kind(model, filter_recr, true)));
}

kv_cache *kv_cache_of(llama_memory_i *memory) {
    if (auto *mixed = dynamic_cast<llama_memory_hybrid *>(memory)) {
        memory = mixed->get_mem_attn();
    } else if (auto *sliding = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        memory = sliding->get_mem_attn();
    }
    if (auto *both = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        memory = both->get_base();
    }
    return dynamic_cast<kv_cache *>(memory);
}

} // namespace xquant

llama_memory_hybrid::llama_memory_hybrid(const llama_model &model, std::unique_ptr<llama_kv_cache> attn,
                                         std::unique_ptr<llama_memory_recurrent> recr)
    : hparams(model.hparams), mem_attn(std::move(attn)), mem_recr(std::move(recr)) {}

llama_memory_hybrid_iswa::llama_memory_hybrid_iswa(const llama_model &model, std::unique_ptr<llama_kv_cache_iswa> attn,
                                                   std::unique_ptr<llama_memory_recurrent> recr)
    : hparams(model.hparams), mem_attn(std::move(attn)), mem_recr(std::move(recr)) {}
