/* xquant-iswa.cpp: models with sliding layers: our cache for the layers that do not slide, llama.cpp's own for those
 * that do.
 *
 * Of a state the sliding layers' part comes first: what follows is checked before anything changes, and if it is
 * refused the sliding layers get back what they held.
 */
#include "xquant-kv-cache.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"

#include <cstring>
#include <stdexcept>

namespace xquant {

namespace {

/* A state in memory. */
struct memory_writer : llama_io_write_i {
    std::vector<uint8_t> bytes;
    void write(const void *src, size_t size) override {
        bytes.insert(bytes.end(), (const uint8_t *)src, (const uint8_t *)src + size);
    }
    void write_tensor(ggml_tensor *tensor, size_t offset, size_t size) override {
        bytes.resize(bytes.size() + size);
        ggml_backend_tensor_get(tensor, bytes.data() + bytes.size() - size, offset, size);
    }
    size_t n_bytes() override { return bytes.size(); }
};

struct memory_reader : llama_io_read_i {
    explicit memory_reader(const std::vector<uint8_t> &bytes) : bytes(bytes) {}
    const std::vector<uint8_t> &bytes;
    size_t at = 0;
    const uint8_t *take(size_t size) {
        if (size > n_left()) {
            throw std::runtime_error("xquant: a saved sliding cache is too short");
        }
        at += size;
        return bytes.data() + at - size;
    }
    void read(void *dst, size_t size) override { memcpy(dst, take(size), size); }
    void read_tensor(ggml_tensor *tensor, size_t offset, size_t size) override {
        ggml_backend_tensor_set(tensor, take(size), offset, size);
    }
    size_t n_bytes() override { return at; }
    size_t n_left() override { return bytes.size() - at; }
};

class kv_cache_iswa final : public llama_kv_cache_iswa {
  public:
    using llama_kv_cache_iswa::llama_kv_cache_iswa;

    llama_memory_context_ptr init_batch(llama_batch_allocr &balloc, uint32_t n_ubatch, bool embd_all) override {
        auto out = llama_kv_cache_iswa::init_batch(balloc, n_ubatch, embd_all);
        return llama_memory_status_is_fail(out->get_status()) && n_ubatch > 1
                   ? init_batch(balloc, n_ubatch / 2, embd_all)
                   : std::move(out);
    }

    void state_write(llama_io_write_i &io, llama_seq_id seq_id, llama_state_seq_flags flags) const override {
        get_swa()->state_write(io, seq_id, flags);
        if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
            get_base()->state_write(io, seq_id, flags);
        }
    }

    void state_read(llama_io_read_i &io, llama_seq_id seq_id, llama_state_seq_flags flags) override {
        memory_writer before;
        const llama_state_seq_flags in_memory = flags & ~(llama_state_seq_flags)LLAMA_STATE_SEQ_FLAGS_ON_DEVICE;
        get_swa()->state_write(before, seq_id, in_memory);
        try {
            get_swa()->state_read(io, seq_id, flags);
            if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
                get_base()->state_read(io, seq_id, flags);
            }
        } catch (...) {
            io.discard();
            if (seq_id < 0) {
                get_swa()->clear(false);
            } else {
                get_swa()->seq_rm(seq_id, -1, -1);
            }
            memory_reader back(before.bytes);
            get_swa()->state_read(back, seq_id, in_memory);
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
    return type_k == GGML_TYPE_XQUANT ? make((kv_cache_iswa *)nullptr) : make((llama_kv_cache_iswa *)nullptr);
}

kv_cache *kv_cache_of(llama_memory_i *memory) {
    if (auto *both = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        memory = both->get_base();
    }
    return dynamic_cast<kv_cache *>(memory);
}

} // namespace xquant
