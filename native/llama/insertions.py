"""What the cache needs in llama.cpp's own files; tools/insert.py describes the form.

What repairs llama.cpp for every type of cache stands in fixes.py; everything else of the fork lies in our own files
beside this one.
"""

OPERATIONS = ("UPDATE", "ATTEND", "UNPACK", "READ_KEYS", "WRITE_KEYS")
ENUMERATORS = "".join(f"GGML_OP_XQUANT_{name},\n" for name in OPERATIONS)
CASES = "".join(f"case GGML_OP_XQUANT_{name}:\n" for name in OPERATIONS)
VIRTUAL = ("ggml_tensor * get_k", "ggml_tensor * get_v", "ggml_tensor * cpy_k", "ggml_tensor * cpy_v", "bool update",
           "slot_info find_slot", "void set_input_kq_mask")  # fmt: skip

# fmt: off
INSERTIONS: list[dict[str, str]] = [
    # -- the type that selects the cache: no tensor has it, so it has neither a size nor a block
    {"name": "type: number", "file": "ggml/include/ggml.h", "in": "enum ggml_type",
     "instead": "GGML_TYPE_COUNT = @ggml_type@,", "text": """
        GGML_TYPE_XQUANT  = @ggml_type@,
        GGML_TYPE_COUNT,
     """},
    {"name": "type: name", "file": "ggml/src/ggml.c", "in": "table type_traits", "at": "begin",
     "text": '[GGML_TYPE_XQUANT] = { .type_name = "xquant" },'},

    # -- the operations of a graph, and who runs them
    {"name": "operations: numbers", "file": "ggml/include/ggml.h", "in": "enum ggml_op", "before": "GGML_OP_COUNT,",
     "text": f"{ENUMERATORS}\n"},
    {"name": "operations: names", "file": "ggml/src/ggml.c", "in": "table GGML_OP_NAME", "at": "end",
     "text": "\n\n" + "".join(f'"XQUANT_{name}",\n' for name in OPERATIONS)},
    {"name": "operations: symbols", "file": "ggml/src/ggml.c", "in": "table GGML_OP_SYMBOL", "at": "end",
     "text": "\n\n" + "".join(f'"xquant_{name.lower()}(x)",\n' for name in OPERATIONS)},
    {"name": "operations: checks of their number", "file": "ggml/src/ggml.c", "in": "file", "times": "2",
     "instead": "static_assert(GGML_OP_COUNT", "text": f"static_assert(GGML_OP_COUNT - {len(OPERATIONS)}"},
    {"name": "operations: check of their number for RPC", "file": "ggml/include/ggml-rpc.h", "in": "file",
     "instead": "static_assert(GGML_OP_COUNT", "text": f"static_assert(GGML_OP_COUNT - {len(OPERATIONS)}"},
    {"name": "CPU: header", "file": "ggml/src/ggml-cpu/ggml-cpu.c", "in": "file",
     "after": '#include "ggml-cpu-impl.h"', "text": '#include "xquant-ops.h"'},
    {"name": "CPU: compute", "file": "ggml/src/ggml-cpu/ggml-cpu.c", "in": "ggml_compute_forward",
     "before": "case GGML_OP_CUSTOM:", "text": CASES + """\
    {
        if (!xquant_compute_cpu(tensor, params->ith, params->nth) && params->ith == 0) {
            params->threadpool->ec = GGML_STATUS_FAILED;
        }
    }
    break;
"""},
    {"name": "CPU: threads", "file": "ggml/src/ggml-cpu/ggml-cpu.c", "in": "ggml_get_n_tasks",
     "before": "case GGML_OP_LIGHTNING_INDEXER:", "text": CASES},
    # one of the builds of ggml-cpu
    {"name": "CPU: header of its choice", "file": "ggml/src/ggml-backend-reg.cpp", "in": "file",
     "after": '#include "ggml-backend-dl.h"', "text": '#include "cpu-variant.h"'},
    {"name": "CPU: choose", "file": "ggml/src/ggml-backend-reg.cpp",
     "in": "ggml_backend_registry::ggml_backend_registry", "instead": "ggml_backend_cpu_reg()",
     "text": "xquant_cpu_reg()"},
    {"name": "CUDA: headers", "file": "ggml/src/ggml-cuda/ggml-cuda.cu", "in": "file",
     "after": '#include "ggml-cuda/common.cuh"', "text": """
        #include "xquant.h"
        #include "xquant-ops.h"

        // of the graph that this thread enqueues, a node was refused
        static thread_local bool xquant_refused = false;
     """},
    {"name": "CUDA: compute", "file": "ggml/src/ggml-cuda/ggml-cuda.cu", "in": "ggml_cuda_compute_forward",
     "before": "default: return false; } cudaError_t err",
     "text": CASES + """\
    xquant_refused = !xquant_compute_cuda(xq_cuda(), dst, ctx.stream()) || xquant_refused;
    return true;
"""},
    {"name": "CUDA: attention of prompts", "file": "ggml/src/ggml-cuda/ggml-cuda.cu",
     "in": "ggml_cuda_compute_forward", "before": "ggml_cuda_flash_attn_ext(ctx, dst);", "text": """
        if (const int64_t n = xquant_prompt_scratch(xq_cuda(), dst); n >= 0) {
            ggml_cuda_pool_alloc<char> scratch(ctx.pool(), (size_t) n);
            xquant_refused = !xquant_prompt(xq_cuda(), dst, scratch.get(), ctx.stream()) || xquant_refused;
            break;
        }
     """},
    {"name": "CUDA: graphs with a refused node", "file": "ggml/src/ggml-cuda/ggml-cuda.cu",
     "in": "ggml_backend_cuda_graph_compute", "before": "return GGML_STATUS_SUCCESS;", "text": """
        if (std::exchange(xquant_refused, false)) {
        #ifdef USE_CUDA_GRAPH
            cuda_ctx->cuda_graphs.erase(graph_key); // what was captured of it is not launched again
        #endif
            return GGML_STATUS_FAILED;
        }

     """},
    {"name": "CUDA: supports", "file": "ggml/src/ggml-cuda/ggml-cuda.cu", "in": "ggml_backend_cuda_device_supports_op",
     "before": "case GGML_OP_CROSS_ENTROPY_LOSS:", "text": CASES + "    return true;"},

    # -- workers of llama.cpp's RPC say whether they run the operations, and how
    {"name": "RPC: header", "file": "ggml/src/ggml-rpc/ggml-rpc.cpp", "in": "file", "after": '#include "ggml-rpc.h"',
     "text": '#include "xquant-ops.h"'},
    {"name": "RPC: say what is run", "file": "ggml/src/ggml-rpc/ggml-rpc.cpp", "in": "rpc_server::hello",
     "after": "response.patch = RPC_PROTO_PATCH_VERSION;",
     "text": "response.padding = xquant_worker(backends.data(), (int)backends.size());"},
    {"name": "RPC: what was said", "file": "ggml/src/ggml-rpc/ggml-rpc.cpp", "in": "ggml_backend_rpc_get_proc_address",
     "at": "begin", "text": """
        if (std::strcmp(name, "ggml_backend_rpc_xquant") == 0) {
            // what xquant_worker() said on the other side; 0: nothing, or operations have other numbers there
            return (void *) +[](ggml_backend_dev_t dev) -> uint8_t {
                const auto dispatcher = get_dispatcher(((ggml_backend_rpc_device_context *) dev->context)->endpoint);
                return dispatcher->hello.patch == RPC_PROTO_PATCH_VERSION ? dispatcher->hello.padding : 0;
            };
        }
     """},

    # -- the plan in the model's metadata, and kv_overrides that name one, are kept with the model
    {"name": "metadata: read", "file": "src/llama-model.cpp", "in": "llama_model_base::load_hparams",
     "after": "for (int i = 0; i < gguf_get_n_kv(ctx); i++) {", "text": """

        xq = xquant::read_metadata(ml);
     """},
    {"name": "metadata: header", "file": "src/llama-model.h", "in": "file", "after": '#include "llama-graph.h"',
     "text": '#include "xquant-metadata.h"'},
    {"name": "metadata: member", "file": "src/llama-model.h", "in": "struct llama_model", "after": "gguf_kv;",
     "text": """
        // what the file says of its KV cache
        std::shared_ptr<const xquant::model_metadata> xq;

     """},

    # -- the cache is made where llama.cpp makes its own for layers with keys and values; elsewhere nothing makes it
    {"name": "cache: check the context", "file": "src/llama-model.cpp", "in": "llama_model::create_memory",
     "at": "begin", "text": """
        xquant::check_context(*this, params, cparams);

     """},
    {"name": "cache: make it beside sliding layers", "file": "src/llama-model.cpp", "in": "llama_model::create_memory",
     "instead": "else { res = new llama_kv_cache_iswa(", "text": """
        else {
            res = xquant::new_kv_cache_iswa(
     """},
    {"name": "cache: make it", "file": "src/llama-model.cpp", "in": "llama_model::create_memory",
     "instead": "GGML_ASSERT(!hparams.is_swa_any()); res = new llama_kv_cache(", "text": """
        GGML_ASSERT(!hparams.is_swa_any());

        res = xquant::new_kv_cache(
                cparams.n_ubatch,
     """},
    {"name": "cache: make it beside recurrent layers", "file": "src/llama-model.cpp",
     "in": "llama_model::create_memory", "instead": "res = new llama_memory_hybrid(", "text": """
        res = xquant::new_memory_hybrid(
                cparams.n_ubatch,
     """},
    {"name": "cache: make it beside recurrent and sliding layers", "file": "src/llama-model.cpp",
     "in": "llama_model::create_memory", "instead": "res = new llama_memory_hybrid_iswa(",
     "text": "res = xquant::new_memory_hybrid_iswa("},
    {"name": "cache: hybrid of parts", "file": "src/llama-memory-hybrid.h", "in": "struct llama_memory_hybrid",
     "before": "~llama_memory_hybrid() = default;", "text": """
        // of parts that were made before
        llama_memory_hybrid(
            const llama_model & model,
            std::unique_ptr<llama_kv_cache> attn,
            std::unique_ptr<llama_memory_recurrent> recr);

     """},
    {"name": "cache: hybrid of parts that slide", "file": "src/llama-memory-hybrid-iswa.h",
     "in": "struct llama_memory_hybrid_iswa", "before": "~llama_memory_hybrid_iswa() = default;", "text": """
        // of parts that were made before
        llama_memory_hybrid_iswa(
            const llama_model & model,
            std::unique_ptr<llama_kv_cache_iswa> attn,
            std::unique_ptr<llama_memory_recurrent> recr);

     """},
    {"name": "cache: check the memory", "file": "src/llama-model.cpp", "in": "llama_model::create_memory",
     "before": "return res; }", "text": """
        xquant::check_memory(*this, params, std::unique_ptr<llama_memory_i>(res));

     """},
    {"name": "cache: check the type", "file": "src/llama-kv-cache.cpp", "in": "llama_kv_cache::llama_kv_cache",
     "before": "GGML_ASSERT(kv_size % n_pad == 0);", "text": "xquant::check_type(model, type_k);"},
    {"name": "cache: global layers", "file": "src/llama-kv-cache-iswa.cpp",
     "in": "llama_kv_cache_iswa::llama_kv_cache_iswa(llama_hparams & hparams)",
     "instead": "kv_base = std::make_unique<llama_kv_cache>( model,", "text": """
        kv_base = xquant::make_kv_cache(
                n_ubatch, model,
     """},
    {"name": "cache: sliding layers stay F16", "file": "src/llama-kv-cache-iswa.cpp",
     "in": "llama_kv_cache_iswa::llama_kv_cache_iswa(llama_hparams & hparams)",
     "instead": "kv_swa = std::make_unique<llama_kv_cache>( model, hparams, type_k, type_v,", "text": """
        kv_swa = std::make_unique<llama_kv_cache>(
                model, hparams, xquant::sliding_type(type_k), xquant::sliding_type(type_v),
     """},

    # -- a subclass of llama_kv_cache
    {"name": "subclass: hooks", "file": "src/llama-kv-cache.h", "in": "file", "after": '#include "llama-memory.h"',
     "text": '#include "xquant-hooks.h"'},
    {"name": "subclass: members", "file": "src/llama-kv-cache.h", "in": "struct llama_kv_cache",
     "instead": "private: const llama_model & model;", "text": """
        protected:
            const llama_model & model;
     """},
    *({"name": f"subclass: {function}", "file": "src/llama-kv-cache.h", "in": "struct llama_kv_cache",
       "instead": function, "text": f"virtual {function}"} for function in VIRTUAL),
    {"name": "subclass: of a context", "file": "src/llama-kv-cache.h", "in": "struct llama_kv_cache_context",
     "before": "get_n_kv()", "text": """
        xquant::kv_cache * xq() const;

     """},
    # where ours stores rows is not llama.cpp's to say: some inputs fill the tensors all the same, which have no memory
    *({"name": f"subclass: no places of {side}", "file": "src/llama-kv-cache.cpp",
       "in": f"llama_kv_cache_context::set_input_{side}_idxs", "at": "begin", "text": """
        if (xq()) {
            return;
        }
       """} for side in ("k", "v")),
    {"name": "subclass: begin a micro-batch", "file": "src/llama-kv-cache.cpp", "in": "llama_kv_cache_context::apply",
     "after": "kv->apply_ubatch(sinfos[i_cur], ubatches[i_cur]);", "text": """
        if (auto * own = xq(); own && !own->begin(sinfos[i_cur])) {
            return false;
        }
     """},
    {"name": "subclass: end a micro-batch", "file": "src/llama-context.cpp",
     "in": "llama_context::decode(const llama_batch_ext & batch_inp)",
     "after": "ctx_type_to_graph_type(cparams.ctx_type), mctx.get(), status);",
     "text": "xquant::end_ubatch(memory.get(), res != nullptr);"},
    {"name": "subclass: header", "file": "src/llama-kv-cache.cpp", "in": "file", "after": '#include "llama-context.h"',
     "text": '#include "xquant-kv-cache.h"'},

    # -- graph: our own attention
    {"name": "graph: header", "file": "src/llama-graph.cpp", "in": "file", "after": '#include "llama-kv-cache.h"',
     "text": '#include "xquant-kv-cache.h"'},
    {"name": "graph: attention", "file": "src/llama-graph.cpp",
     "in": "llm_graph_context::build_attn(llm_graph_input_attn_kv *)", "instead": "build_attn_mha", "text": """
        mctx_cur->xq()
            ? mctx_cur->xq()->build_attention(*this, q_cur, k_cur, v_cur, kq_b, kq_mask, sinks, v_mla, kq_scale, il)
            : build_attn_mha
     """},
    {"name": "graph: attention over latent rows", "file": "src/llama-graph.cpp",
     "in": "llm_graph_context::build_attn(llm_graph_input_attn_k *)", "instead": "ggml_tensor * v = ggml_view_4d(",
     "text": "ggml_tensor * v = mctx_cur->xq() ? v_cur : ggml_view_4d("},
    {"name": "graph: attention of latent layers", "file": "src/llama-graph.cpp",
     "in": "llm_graph_context::build_attn(llm_graph_input_attn_k *)", "instead": "build_attn_mha", "text": """
        mctx_cur->xq()
            ? mctx_cur->xq()->build_attention(*this, q_cur, k_cur, v_cur, kq_b, kq_mask, sinks, v_mla, kq_scale, il)
            : build_attn_mha
     """},
    {"name": "graph: attention beside sliding layers", "file": "src/llama-graph.cpp",
     "in": "llm_graph_context::build_attn(llm_graph_input_attn_kv_iswa *)", "instead": "build_attn_mha", "text": """
        mctx_cur->xq()
            ? mctx_cur->xq()->build_attention(*this, q_cur, k_cur, v_cur, kq_b, kq_mask, sinks, v_mla, kq_scale, il)
            : build_attn_mha
     """},
    # long caches are unpacked in up to eight pieces a layer, of eleven nodes each (xquant-graph.cpp)
    {"name": "graph: room for nodes", "file": "src/llama-context.cpp", "in": "llama_context::graph_max_nodes",
     "after": "if (n_sampling_outputs_max > 1) {", "text": """

        res += 8u*12u*model.hparams.n_layer_all;
     """},
]

# llama.cpp's own programs: the names of cache types that they take
FRONT_ENDS: list[dict[str, str]] = [
    {"name": "type: option of the front ends", "file": "common/arg.cpp", "in": "table kv_cache_types", "at": "begin",
     "text": "GGML_TYPE_XQUANT,"},
    {"name": "type: option of llama-bench", "file": "tools/llama-bench/llama-bench.cpp", "in": "ggml_type_from_name",
     "at": "begin", "text": """
        if (s == "xquant") {
            return GGML_TYPE_XQUANT;
        }
     """},

    # llama-server: the cache in /metrics, the plan in /props
    {"name": "server: header", "file": "tools/server/server-common.h", "in": "file", "after": '#include "llama.h"',
     "text": '#include "xquant-server.h"'},
    {"name": "server: numbers", "file": "tools/server/server-common.h", "in": "struct server_metrics", "at": "begin",
     "text": "xquant::server_numbers xq;"},
    {"name": "server: read numbers", "file": "tools/server/server-context.cpp",
     "in": "server_context_impl::metrics_post_decode", "at": "begin", "text": "metrics.xq.read(ctx_tgt);"},
    {"name": "server: metrics", "file": "tools/server/server-task.cpp", "in": "server_task_result_metrics::to_metrics",
     "before": "return prometheus.str();", "text": """
        add_items("gauge", metrics.xq.gauges<metric_item>());

     """},
    {"name": "server: plan", "file": "tools/server/server-context.h", "in": "struct server_context_meta", "at": "end",
     "text": "json xq;"},
    {"name": "server: find the plan", "file": "tools/server/server-context.cpp", "in": "server_context::get_meta",
     "after": "ftype_name,", "text": "/* xquant */ xquant::server_plan<json>(impl->ctx_tgt),"},
    {"name": "server: props", "file": "tools/server/server-context.cpp", "in": "get_res_props",
     "before": "if (params.use_jinja) {", "text": """
        if (!meta.xq.is_null()) {
            props["xquant"] = meta.xq;
        }
     """},
]
