/* xquant-hooks.h: what llama.cpp's own files call of ours, for llama-kv-cache.h to include. */
#pragma once

#include "llama-memory.h"

#include <memory>

class llama_kv_cache;
class llama_kv_cache_iswa;
class llama_memory_hybrid;
class llama_memory_hybrid_iswa;
struct llama_context;
struct llama_cparams;
struct llama_hparams;
struct llama_model;

namespace xquant {

class kv_cache;

/* Called before a context's memory is made: throws where the cache type is xquant and the context's options or its
 * model do not allow it. */
void check_context(const llama_model &model, const llama_memory_params &params, const llama_cparams &cparams);
/* Called after it: throws if nothing of the memory is of the type that was asked for. */
void check_memory(const llama_model &model, const llama_memory_params &params, std::unique_ptr<llama_memory_i> memory);
/* Called where a llama_kv_cache is made that is not one of ours: throws if its type is xquant. */
void check_type(const llama_model &model, ggml_type type_k);
/* The type of a cache of sliding layers, which is llama.cpp's own. */
inline ggml_type sliding_type(ggml_type type) {
    return type == GGML_TYPE_XQUANT ? GGML_TYPE_F16 : type;
}

/* Whether a saved cell may be one of a cache, of any type: its position, and how many sequences it has; if not, the log
 * says why. */
bool may_load_cell(llama_pos pos, uint32_t n_sequences, uint32_t n_seq_max);

/* Called after the graph of a micro-batch ran, or failed to: pages of our cache lie as it left them. */
void end_ubatch(llama_memory_i *memory, bool ran);

/* What a call of llama_decode or llama_encode returns, once all is computed: -3 if a worker of llama.cpp's RPC that the
 * context uses is lost, of which the log says which one. */
int with_all_workers(llama_context &context, int result);
/* Throws if one is: what was read from it is not what lay there. */
void require_all_workers(const llama_context &context);

/* In place of a constructor of llama_kv_cache, with its arguments: the type decides which class is made. */
std::unique_ptr<llama_kv_cache> make_kv_cache(uint32_t n_ubatch, const llama_model &model, const llama_hparams &hparams,
                                              ggml_type type_k, ggml_type type_v, bool v_trans, bool offload,
                                              bool unified, uint32_t kv_size, uint32_t n_seq_max, uint32_t n_pad,
                                              uint32_t n_swa, llama_swa_type swa_type, llama_memory_t mem_other,
                                              const llama_memory_i::layer_filter_cb &filter,
                                              const llama_memory_i::layer_reuse_cb &reuse,
                                              const llama_memory_i::layer_share_cb &share);
template <typename... Args> llama_kv_cache *new_kv_cache(Args &&...args) {
    return make_kv_cache(std::forward<Args>(args)...).release();
}
/* Likewise for a model with sliding layers. */
llama_kv_cache_iswa *new_kv_cache_iswa(const llama_model &model, ggml_type type_k, ggml_type type_v, bool v_trans,
                                       bool offload, bool swa_full, bool unified, uint32_t kv_size, uint32_t n_seq_max,
                                       uint32_t n_ubatch, uint32_t n_pad, llama_memory_t mem_other,
                                       const llama_memory_i::layer_filter_cb &filter,
                                       const llama_memory_i::layer_reuse_cb &reuse,
                                       const llama_memory_i::layer_share_cb &share);

/* Likewise for a model with recurrent layers, without and with sliding ones. */
llama_memory_hybrid *new_memory_hybrid(uint32_t n_ubatch, const llama_model &model, ggml_type type_k, ggml_type type_v,
                                       bool v_trans, uint32_t kv_size, uint32_t n_pad, uint32_t n_swa,
                                       llama_swa_type swa_type, ggml_type type_r, ggml_type type_s, uint32_t rs_size,
                                       uint32_t n_seq_max, uint32_t n_rs_seq, bool offload, bool unified,
                                       const llama_memory_i::layer_filter_cb &filter_attn,
                                       const llama_memory_i::layer_filter_cb &filter_recr);
llama_memory_hybrid_iswa *new_memory_hybrid_iswa(const llama_model &model, ggml_type type_k, ggml_type type_v,
                                                 bool v_trans, bool swa_full, uint32_t kv_size, uint32_t n_ubatch,
                                                 uint32_t n_pad, ggml_type type_r, ggml_type type_s, uint32_t rs_size,
                                                 uint32_t n_seq_max, uint32_t n_rs_seq, bool offload, bool unified,
                                                 const llama_memory_i::layer_filter_cb &filter_attn,
                                                 const llama_memory_i::layer_filter_cb &filter_recr);

} // namespace xquant
