"""What the fork changes in llama.cpp's own files: (file, anchor, text, where), where = before, after or instead.

An anchor must occur exactly once in its file.  Those about saved states: insertions_state.py.  Everything else of the
fork lies in our own files beside these.
"""

INSERTIONS: list[tuple[str, str, str, str]] = [
    # -- the type that selects the cache: no tensor has it, so it has neither a size nor a block
    (
        "ggml/include/ggml.h",
        "        GGML_TYPE_COUNT   = 43,",
        "        GGML_TYPE_XQUANT  = 43,\n        GGML_TYPE_COUNT   = 44,",
        "instead",
    ),
    (
        "ggml/src/ggml.c",
        "static const struct ggml_type_traits type_traits[GGML_TYPE_COUNT] = {\n",
        '    [GGML_TYPE_XQUANT] = { .type_name = "xquant" },\n',
        "after",
    ),
    ("common/arg.cpp", "const std::vector<ggml_type> kv_cache_types = {\n", "    GGML_TYPE_XQUANT,\n", "after"),
    # -- the plan in the model's metadata, and kv_overrides that name one, are kept with the model
    (
        "src/llama-model.cpp",
        "    // get general kv\n    ml.get_key(LLM_KV_GENERAL_NAME, name, false);\n",
        "    xq = xquant::read_metadata(ml.metadata, ml.kv_overrides);\n\n",
        "before",
    ),
    ("src/llama-model.h", '#include "llama-graph.h"\n', '#include "xquant-metadata.h"\n', "after"),
    (
        "src/llama-model.h",
        "    std::unordered_map<std::string, std::string> gguf_kv;\n",
        "    // the KV cache plan of the file\n    std::shared_ptr<const xquant::metadata> xq;\n\n",
        "after",
    ),
    # -- the cache is made: what it cannot serve is refused first
    ("src/llama-model.cpp", '#include "llama-kv-cache.h"\n', '#include "xquant-cache.h"\n', "after"),
    (
        "src/llama-model.cpp",
        "    llama_memory_i * res;\n\n    switch (arch) {\n"
        "        // Models that need specific instantiation should be handled in the\n",
        "    xquant::announce(*this, params, cparams);\n\n",
        "before",
    ),
    (
        "src/llama-kv-cache.h",
        "struct llama_cparams;\nstruct llama_hparams;\n",
        "namespace xquant { class cache; }\n",
        "before",
    ),
    (
        "src/llama-kv-cache.h",
        "    //\n    // llama_kv_cache specific API\n    //\n\n    uint32_t get_size()     const;\n",
        "    friend class xquant::cache;\n\n"
        "    // set if the type is GGML_TYPE_XQUANT: it then stores the keys and values of this cache\n"
        "    std::shared_ptr<xquant::cache> xq;\n\n",
        "before",
    ),
    (
        "src/llama-kv-cache.h",
        "    uint32_t get_n_kv() const;\n\n    ggml_type type_k() const;\n",
        "    xquant::cache * xq() const { return kv->xq.get(); }\n\n",
        "before",
    ),
    ("src/llama-kv-cache.cpp", '#include "llama-context.h"\n', '#include "xquant-cache.h"\n', "after"),
    (
        "src/llama-kv-cache.cpp",
        "    const bool is_mla = hparams.is_mla();\n",
        "    if (type_k == GGML_TYPE_XQUANT) {\n"
        "        xq = std::make_shared<xquant::cache>(*this, kv_size, filter);\n"
        "    }\n\n",
        "before",
    ),
    (
        "src/llama-kv-cache.cpp",
        "size_t(2u*(1 + n_stream)*n_layer*ggml_tensor_overhead())",
        "size_t(2u*(2 + n_stream)*n_layer*ggml_tensor_overhead())",
        "instead",
    ),
    (
        "src/llama-kv-cache.cpp",
        "            dev_name = ggml_backend_dev_name(dev);\n",
        "            if (xq && !xq->runs_on(dev)) {\n"
        '                buft = ggml_backend_cpu_buffer_type();\n                dev_name = "CPU";\n            }\n',
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        '            throw std::runtime_error("failed to create ggml context for kv cache");\n        }\n',
        "\n        if (xq) {\n"
        "            const auto [xk, xv] = xq->add_layer(ctx, buft, il);\n"
        "            map_layer_ids[il] = layers.size();\n"
        "            layers.push_back({ il, xk, xv, {}, {}, });\n"
        "            continue;\n"
        "        }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "void llama_kv_cache::clear(bool data) {\n",
        "    if (xq) {\n        xq->clear();\n    }\n\n",
        "after",
    ),
    # -- sequences: between streams the copy is made at once, so that saving, loading and shifting need not wait for it
    (
        "src/llama-kv-cache.cpp",
        "    // cross-stream sequence copies require to copy the actual buffer data\n\n",
        "    if (xq && (p0 > 0 || p1 >= 0)) {\n"
        "        seq_cp(seq_id_src, seq_id_dst, -1, -1);\n"
        "        if (p0 > 0) {\n            seq_rm(seq_id_dst, 0, p0);\n        }\n"
        "        if (p1 >= 0) {\n            seq_rm(seq_id_dst, p1, -1);\n        }\n"
        "        return;\n    }\n\n",
        "before",
    ),
    (
        "src/llama-kv-cache.cpp",
        "    sc_info.ssrc.push_back(s0);\n    sc_info.sdst.push_back(s1);\n",
        "    if (xq) {\n        xq->copy_stream(s0, s1);\n    } else {\n"
        "        sc_info.ssrc.push_back(s0);\n        sc_info.sdst.push_back(s1);\n    }\n",
        "instead",
    ),
    (
        "src/llama-kv-cache.cpp",
        "bool llama_kv_cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {\n",
        "    if (xq && seq_id != -1 && !xq->has_sequence(seq_id, __func__)) {\n        return false;\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "void llama_kv_cache::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {\n",
        "    if (xq && !(xq->has_sequence(seq_id_src, __func__) && xq->has_sequence(seq_id_dst, __func__))) {\n"
        "        return;\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "void llama_kv_cache::seq_keep(llama_seq_id seq_id) {\n",
        "    if (xq && !xq->has_sequence(seq_id, __func__)) {\n        return;\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "void llama_kv_cache::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {\n",
        "    if (xq && !xq->may_add(seq_id, shift)) {\n        return;\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "void llama_kv_cache::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {\n",
        "    if (xq && !xq->may_divide(seq_id, d)) {\n        return;\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "llama_pos llama_kv_cache::seq_pos_min(llama_seq_id seq_id) const {\n",
        "    if (xq && !xq->has_sequence(seq_id, __func__)) {\n        return -1;\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "llama_pos llama_kv_cache::seq_pos_max(llama_seq_id seq_id) const {\n",
        "    if (xq && !xq->has_sequence(seq_id, __func__)) {\n        return -1;\n    }\n",
        "after",
    ),
    # -- a key at position p that moves to p / d is to be rotated by p / d - p, for every cache type
    (
        "src/llama-kv-cells.h",
        "        shift[i] += p_old - pos[i];\n",
        "        shift[i] += pos[i] - p_old;\n",
        "instead",
    ),
    # -- cells: a micro-batch writes no more pages than there are slots, and sealed ones last
    (
        "src/llama-kv-cache.cpp",
        "        auto sinfos = prepare(ubatches);\n",
        "        if (xq && sinfos.empty() && n_ubatch > 1) {\n"
        "            return init_batch(balloc, n_ubatch/2, embd_all);\n"
        "        }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "    // remember the old state of the cells so we can restore it in the end\n",
        "    if (xq) {\n        xq->release_pages();\n    }\n\n",
        "before",
    ),
    (
        "src/llama-kv-cache.cpp",
        "llama_kv_cache::slot_info llama_kv_cache::find_slot(const llama_ubatch & ubatch, bool cont) const {\n",
        "    if (xq) {\n        return xq->find_slot(ubatch);\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "        // apply K-shift if needed\n",
        "        if (xq && hparams.rope_type != LLAMA_ROPE_TYPE_NONE) {\n"
        "            if (!xq->shift(lctx)) {\n                return updated;\n            }\n"
        "            updated = true;\n        } else\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "    kv->apply_ubatch(sinfos[i_cur], ubatches[i_cur]);\n",
        "    if (kv->xq && !kv->xq->begin(sinfos[i_cur])) {\n        return false;\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache-iswa.cpp",
        "    // TODO: if we fail again, we should attempt different splitting strategies\n",
        "    if (kv_base->xq && n_ubatch > 1) {\n        return init_batch(balloc, n_ubatch/2, embd_all);\n    }\n\n",
        "before",
    ),
    # -- graph: our own input and our own attention
    (
        "src/llama-kv-cache.cpp",
        "ggml_tensor * llama_kv_cache::get_k(ggml_context * ctx, int32_t il, uint32_t n_kv,"
        " const slot_info & sinfo) const {\n",
        "    if (xq) {\n        return nullptr;\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "ggml_tensor * llama_kv_cache::get_v(ggml_context * ctx, int32_t il, uint32_t n_kv,"
        " const slot_info & sinfo) const {\n",
        "    if (xq) {\n        return nullptr;\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "ggml_tensor * llama_kv_cache::cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs,"
        " int32_t il, const slot_info & sinfo) const {\n",
        "    if (xq) {\n        return k_cur; // stored by xquant::cache::build_attention\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "ggml_tensor * llama_kv_cache::cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs,"
        " int32_t il, const slot_info & sinfo) const {\n",
        "    if (xq) {\n        return v_cur;\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "ggml_tensor * llama_kv_cache::build_input_k_idxs(ggml_context * ctx, const llama_ubatch & ubatch) const {\n",
        "    if (xq) {\n        return xq->build_input(ctx, ubatch.n_tokens);\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "ggml_tensor * llama_kv_cache::build_input_v_idxs(ggml_context * ctx, const llama_ubatch & ubatch) const {\n",
        "    if (xq) {\n        return nullptr;\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "void llama_kv_cache::set_input_k_idxs(ggml_tensor * dst, const llama_ubatch * ubatch,"
        " const slot_info & sinfo) const {\n",
        "    if (xq) {\n        xq->set_input(dst, sinfo);\n        return;\n    }\n",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        "void llama_kv_cache::set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch,"
        " bool causal_attn) const {\n",
        "    if (xq && xq->set_mask(dst, *ubatch, causal_attn)) {\n        return;\n    }\n",
        "after",
    ),
    ("src/llama-graph.cpp", '#include "llama-kv-cache.h"\n', '#include "xquant-cache.h"\n', "after"),
    (
        "src/llama-graph.cpp",
        "    ggml_tensor * kq_mask = inp->get_kq_mask();\n\n    ggml_tensor * cur = ",
        "mctx_cur->xq()\n"
        "        ? mctx_cur->xq()->build_attention(*this, inp->get_k_idxs(), q_cur, k_cur, v_cur, kq_b, kq_mask, sinks,"
        " v_mla, kq_scale, il)\n        : ",
        "after",
    ),
    (
        "src/llama-graph.cpp",
        "    ggml_tensor * k = use_kv_cur ? k_cur : mctx_cur->get_k(ctx0, il);\n"
        "    ggml_tensor * v = use_kv_cur ? v_cur : mctx_cur->get_v(ctx0, il);\n\n    ggml_tensor * cur = ",
        "mctx_cur->xq()\n"
        "        ? mctx_cur->xq()->build_attention(*this, inp->get_k_idxs(), q_cur, k_cur, v_cur, kq_b, kq_mask, sinks,"
        " v_mla, kq_scale, il)\n        : ",
        "after",
    ),
    (
        "src/llama-kv-cache.cpp",
        '            throw std::runtime_error("failed to allocate buffer for kv cache");\n',
        '            if (xq) {\n                xquant::refuse("its memory could not be allocated");\n            }\n',
        "before",
    ),
    # -- iSWA: the sliding layers are small and stay F16
    (
        "src/llama-kv-cache-iswa.cpp",
        "    kv_swa = std::make_unique<llama_kv_cache>(\n",
        "    if (type_k == GGML_TYPE_XQUANT) {\n        type_k = type_v = GGML_TYPE_F16;\n    }\n\n",
        "before",
    ),
    # -- graph: long caches are unpacked in up to eight pieces a layer, of eleven nodes each (xquant-graph.cpp)
    (
        "src/llama-context.cpp",
        "    if (cparams.training) {\n        res *= 4;\n    }\n",
        "    res += 8u*12u*model.hparams.n_layer_all;\n\n",
        "before",
    ),
    # -- CUDA runs our nodes
    ("ggml/src/ggml-cuda/ggml-cuda.cu", '#include "ggml-cuda/common.cuh"\n', '#include "xquant-cuda.h"\n', "after"),
    (
        "ggml/src/ggml-cuda/ggml-cuda.cu",
        "        case GGML_OP_LIGHTNING_INDEXER:\n            ggml_cuda_lightning_indexer(ctx, dst);\n"
        "            break;\n",
        "        case GGML_OP_CUSTOM:\n            return xquant_cuda_compute(dst, ctx.stream());\n",
        "after",
    ),
    (
        "ggml/src/ggml-cuda/ggml-cuda.cu",
        "        case GGML_OP_FLASH_ATTN_EXT:\n"
        "            return ggml_cuda_flash_attn_ext_supported(dev_ctx->device, op);\n",
        "        case GGML_OP_CUSTOM:\n            return xquant_cuda_supports(op);\n",
        "after",
    ),
]
