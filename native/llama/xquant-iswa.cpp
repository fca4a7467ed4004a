/* xquant-iswa.cpp: models with sliding layers: our cache for the layers that do not slide, llama.cpp's own for those
 * that do.
 *
 * Of a state the sliding layers' part comes first: what follows is checked before anything changes, and if it is
 * refused the sliding layers get back what they held.
 */
#include "xquant-kv-cache.h"
#include "xquant-snapshot.h"

#include "llama-kv-cache-iswa.h"
#include "llama-model.h"

namespace xquant {

namespace {

class kv_cache_iswa final : public llama_kv_cache_iswa {
  public:
    using llama_kv_cache_iswa::llama_kv_cache_iswa;

    llama_memory_context_ptr init_batch(llama_batch_allocr &balloc, uint32_t n_ubatch, bool embd_all) override {
        return in_fewer_tokens(*kv_cache_of(this), balloc, n_ubatch,
                               [&](uint32_t n) { return llama_kv_cache_iswa::init_batch(balloc, n, embd_all); });
    }

    void state_write(llama_io_write_i &io, llama_seq_id seq_id, llama_state_seq_flags flags) const override {
        get_swa()->state_write(io, seq_id, flags);
        if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
            get_base()->state_write(io, seq_id, flags);
        }
    }

    void state_read(llama_io_read_i &io, llama_seq_id seq_id, llama_state_seq_flags flags) override {
        const snapshot before(*get_swa(), seq_id, flags);
        try {
            get_swa()->state_read(io, seq_id, flags);
            if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
                get_base()->state_read(io, seq_id, flags);
            }
        } catch (...) {
            io.discard();
            before.restore(*get_swa());
            throw;
        }
    }
};

} // namespace

llama_kv_cache_iswa *new_kv_cache_iswa(const llama_model &model, ggml_type type_k, ggml_type type_v, bool v_trans,
                                       bool offload, bool swa_full, bool unified, uint32_t kv_size, uint32_t n_seq_max,
                                       uint32_t n_ubatch, uint32_t n_pad, llama_memory_t mem_other,
                                       const llama_memory_i::layer_filter_cb &filter,
                                       const llama_memory_i::layer_reuse_cb &reuse,
                                       const llama_memory_i::layer_share_cb &share) {
    const auto make = [&](auto *type) {
        using kind = std::remove_pointer_t<decltype(type)>;
        return new kind(model, type_k, type_v, v_trans, offload, swa_full, unified, kv_size, n_seq_max, n_ubatch, n_pad,
                        mem_other, filter, reuse, share);
    };
    if (type_k == GGML_TYPE_XQUANT && model.hparams.is_mla()) {
        refuse_model(model, "it has latent layers (MLA) beside sliding ones");
    }
    return type_k == GGML_TYPE_XQUANT ? make((kv_cache_iswa *)nullptr) : make((llama_kv_cache_iswa *)nullptr);
}

} // namespace xquant
