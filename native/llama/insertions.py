"""What the fork changes in llama.cpp's own files for the cache: (file, anchor, text, where), where = before, after or
instead.

An anchor must occur exactly once in its file.  Fixes that touch every cache type: fixes.py.  Everything else of the fork
lies in our own files beside these.
"""

OPERATIONS = ("UPDATE", "ATTEND", "UNPACK", "READ_KEYS", "WRITE_KEYS")

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
    # -- the operations of a graph, and who runs them
    (
        "ggml/include/ggml.h",
        "        GGML_OP_COUNT,\n",
        "".join(f"        GGML_OP_XQUANT_{name},\n" for name in OPERATIONS) + "\n",
        "before",
    ),
    (
        "ggml/src/ggml.c",
        '    "GLU",\n};\n\nstatic_assert(GGML_OP_COUNT == 101, "GGML_OP_COUNT != 101");\n',
        '    "GLU",\n\n' + "".join(f'    "XQUANT_{name}",\n' for name in OPERATIONS) + "};\n\n"
        'static_assert(GGML_OP_COUNT == 106, "GGML_OP_COUNT != 106");\n',
        "instead",
    ),
    (
        "ggml/src/ggml.c",
        '    "glu(x)",\n};\n\nstatic_assert(GGML_OP_COUNT == 101, "GGML_OP_COUNT != 101");\n',
        '    "glu(x)",\n\n' + "".join(f'    "xquant_{name.lower()}(x)",\n' for name in OPERATIONS) + "};\n\n"
        'static_assert(GGML_OP_COUNT == 106, "GGML_OP_COUNT != 106");\n',
        "instead",
    ),
    (
        "ggml/include/ggml-rpc.h",
        "static_assert(GGML_OP_COUNT == 101,",
        "static_assert(GGML_OP_COUNT == 106,",
        "instead",
    ),
    ("ggml/src/ggml-cpu/ggml-cpu.c", '#include "ggml-cpu-impl.h"\n', '#include "xquant-ops.h"\n', "after"),
    (
        "ggml/src/ggml-cpu/ggml-cpu.c",
        "        case GGML_OP_CUSTOM:\n            {\n                ggml_compute_forward_custom(params, tensor);\n",
        "".join(f"        case GGML_OP_XQUANT_{name}:\n" for name in OPERATIONS)
        + "            {\n                xquant_compute_cpu(tensor, params->ith, params->nth);\n            }\n"
        "            break;\n",
        "before",
    ),
    (
        "ggml/src/ggml-cpu/ggml-cpu.c",
        "        case GGML_OP_LIGHTNING_INDEXER:\n            {\n                n_tasks = n_threads;\n",
        "".join(f"        case GGML_OP_XQUANT_{name}:\n" for name in OPERATIONS),
        "before",
    ),
    (
        "ggml/src/ggml-cuda/ggml-cuda.cu",
        '#include "ggml-cuda/common.cuh"\n',
        '#include "xquant.h"\n#include "xquant-ops.h"\n',
        "after",
    ),
    (
        "ggml/src/ggml-cuda/ggml-cuda.cu",
        "        case GGML_OP_LIGHTNING_INDEXER:\n            ggml_cuda_lightning_indexer(ctx, dst);\n"
        "            break;\n",
        "".join(f"        case GGML_OP_XQUANT_{name}:\n" for name in OPERATIONS)
        + "            return xquant_compute_cuda(xq_cuda(), dst, ctx.stream());\n",
        "after",
    ),
    (
        "ggml/src/ggml-cuda/ggml-cuda.cu",
        "        case GGML_OP_FLASH_ATTN_EXT:\n"
        "            return ggml_cuda_flash_attn_ext_supported(dev_ctx->device, op);\n",
        "".join(f"        case GGML_OP_XQUANT_{name}:\n" for name in OPERATIONS) + "            return true;\n",
        "after",
    ),
    # -- the plan in the model's metadata, and kv_overrides that name one, are kept with the model
    (
        "src/llama-model.cpp",
        "    // get general kv\n    ml.get_key(LLM_KV_GENERAL_NAME, name, false);\n",
        "    xq = xquant::read_metadata(ml);\n\n",
        "before",
    ),
    ("src/llama-model.h", '#include "llama-graph.h"\n', '#include "xquant-metadata.h"\n', "after"),
    (
        "src/llama-model.h",
        "    std::unordered_map<std::string, std::string> gguf_kv;\n",
        "    // what the file says of its KV cache\n    std::shared_ptr<const xquant::model_metadata> xq;\n\n",
        "after",
    ),
    # -- the cache is made where llama.cpp makes its own for layers with keys and values; elsewhere nothing makes it
    (
        "src/llama-model.cpp",
        "    llama_memory_i * res;\n\n    switch (arch) {\n"
        "        // Models that need specific instantiation should be handled in the\n",
        "    xquant::check_context(*this, params, cparams);\n\n",
        "before",
    ),
    (
        "src/llama-model.cpp",
        "                                    share);\n                        } else {\n"
        "                            res = new llama_kv_cache_iswa(\n",
        "                                    share);\n                        } else {\n"
        "                            res = xquant::new_kv_cache_iswa(\n",
        "instead",
    ),
    (
        "src/llama-model.cpp",
        "                        GGML_ASSERT(!hparams.is_swa_any());\n\n                        res = new llama_kv_cache(\n",
        "                        GGML_ASSERT(!hparams.is_swa_any());\n\n"
        "                        res = xquant::new_kv_cache(\n                                cparams.n_ubatch,\n",
        "instead",
    ),
    (
        "src/llama-model.cpp",
        "    return res;\n}\n\nggml_cgraph * llama_model::build_graph(",
        "    xquant::check_memory(*this, params, std::unique_ptr<llama_memory_i>(res));\n\n",
        "before",
    ),
    (
        "src/llama-kv-cache.cpp",
        "    GGML_ASSERT(kv_size % n_pad == 0);\n",
        "    xquant::check_type(model, type_k);\n",
        "before",
    ),
    (
        "src/llama-kv-cache-iswa.cpp",
        "    kv_base = std::make_unique<llama_kv_cache>(\n            model,",
        "    kv_base = xquant::make_kv_cache(\n            n_ubatch, model,",
        "instead",
    ),
    (
        "src/llama-kv-cache-iswa.cpp",
        "    kv_swa = std::make_unique<llama_kv_cache>(\n            model, hparams, type_k, type_v,",
        "    kv_swa = std::make_unique<llama_kv_cache>(\n"
        "            model, hparams, xquant::sliding_type(type_k), xquant::sliding_type(type_v),",
        "instead",
    ),
    # -- a subclass of llama_kv_cache
    ("src/llama-kv-cache.h", '#include "llama-memory.h"\n', '#include "xquant-hooks.h"\n', "after"),
    (
        "src/llama-kv-cache.h",
        "private:\n    const llama_model & model;\n",
        "protected:\n    const llama_model & model;\n",
        "instead",
    ),
    *[
        ("src/llama-kv-cache.h", anchor, f"    virtual {anchor.lstrip()}", "instead")
        for anchor in (
            "    ggml_tensor * get_k(ggml_context * ctx, int32_t il, uint32_t n_kv",
            "    ggml_tensor * get_v(ggml_context * ctx, int32_t il, uint32_t n_kv",
            "    ggml_tensor * cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il, const",
            "    ggml_tensor * cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, int32_t il, const",
            "    bool update(llama_context * lctx, bool do_shift,",
            "    slot_info find_slot(",
            "    void set_input_kq_mask   (ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const;\n"
            "    void set_input_pos_bucket(ggml_tensor * dst, const llama_ubatch * ubatch) const;\n\n"
            "    void set_input_k_rot(ggml_tensor * dst) const;\n    void set_input_v_rot(ggml_tensor * dst) const;\n\n"
            "    // true if",
        )
    ],
    (
        "src/llama-kv-cache.h",
        "    uint32_t get_n_kv() const;\n\n    ggml_type type_k() const;\n",
        "    xquant::kv_cache * xq() const;\n\n",
        "before",
    ),
    (
        "src/llama-kv-cache.cpp",
        "    kv->apply_ubatch(sinfos[i_cur], ubatches[i_cur]);\n",
        "    if (auto * own = xq(); own && !own->begin(sinfos[i_cur])) {\n        return false;\n    }\n",
        "after",
    ),
    ("src/llama-kv-cache.cpp", '#include "llama-context.h"\n', '#include "xquant-kv-cache.h"\n', "after"),
    # -- graph: our own attention
    ("src/llama-graph.cpp", '#include "llama-kv-cache.h"\n', '#include "xquant-kv-cache.h"\n', "after"),
    (
        "src/llama-graph.cpp",
        "    ggml_tensor * kq_mask = inp->get_kq_mask();\n\n    ggml_tensor * cur = ",
        "mctx_cur->xq()\n"
        "        ? mctx_cur->xq()->build_attention(*this, q_cur, k_cur, v_cur, kq_b, kq_mask, sinks, v_mla, kq_scale, il)\n"
        "        : ",
        "after",
    ),
    (
        "src/llama-graph.cpp",
        "    ggml_tensor * k = use_kv_cur ? k_cur : mctx_cur->get_k(ctx0, il);\n"
        "    ggml_tensor * v = use_kv_cur ? v_cur : mctx_cur->get_v(ctx0, il);\n\n    ggml_tensor * cur = ",
        "mctx_cur->xq()\n"
        "        ? mctx_cur->xq()->build_attention(*this, q_cur, k_cur, v_cur, kq_b, kq_mask, sinks, v_mla, kq_scale, il)\n"
        "        : ",
        "after",
    ),
    # -- graph: long caches are unpacked in up to eight pieces a layer, of eleven nodes each (xquant-graph.cpp)
    (
        "src/llama-context.cpp",
        "    if (cparams.training) {\n        res *= 4;\n    }\n",
        "    res += 8u*12u*model.hparams.n_layer_all;\n\n",
        "before",
    ),
]
print(len(INSERTIONS)) if __name__ == "__main__" else None
