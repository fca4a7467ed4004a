// What llama.cpp's test programs need beside the few files of its common code that are built with them, so that option
// parsing, downloads, chat templates and speculative decoding, most of that code, need not be compiled.
//
//   common_params_parse   the options that tests/fork/test_upstream.py gives, with llama.cpp's names
//   __wrap_*              the linker sends calls of the test programs here (--wrap): cache types that are not F16 get
//                         flash attention, which they need, also where a program switches it off; and each context
//                         tells at its end which cache it had
#include "arg.h"
#include "build-info.h"
#include "common.h"
#include "log.h"
#include "speculative.h"
#include "xquant_llama.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

static ggml_type type_named(const std::string &name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        if (name == ggml_type_name((ggml_type)i)) {
            return (ggml_type)i;
        }
    }
    throw std::invalid_argument("unknown cache type " + name);
}

static void set_option(common_params &params, const std::string &name, const char *value) {
    if (name == "-m") {
        params.model.path = value;
    } else if (name == "-p") {
        params.prompt = value;
    } else if (name == "-o") {
        params.out_file = value;
    } else if (name == "-n") {
        params.n_predict = std::stoi(value);
    } else if (name == "-c") {
        params.n_ctx = std::stoi(value);
    } else if (name == "-b") {
        params.n_batch = std::stoi(value);
    } else if (name == "-ub") {
        params.n_ubatch = std::stoi(value);
    } else if (name == "-np") {
        params.n_parallel = std::stoi(value);
    } else if (name == "-t") {
        params.cpuparams.n_threads = std::stoi(value);
    } else if (name == "-ngl") {
        params.n_gpu_layers = std::stoi(value);
    } else if (name == "-ctk") {
        params.cache_type_k = type_named(value);
    } else if (name == "-ctv") {
        params.cache_type_v = type_named(value);
    } else if (name == "--override-kv") {
        if (!string_parse_kv_override(value, params.kv_overrides)) {
            throw std::invalid_argument(std::string("--override-kv ") + value);
        }
    } else {
        throw std::invalid_argument("unknown option " + name);
    }
}

bool common_params_parse(int argc, char **argv, common_params &params, llama_example, void (*)(int, char **)) {
    common_log_set_verbosity_thold(params.verbosity);
    try {
        for (int i = 1; i < argc; i += 2) {
            if (i + 1 == argc) {
                throw std::invalid_argument(std::string(argv[i]) + " needs a value");
            }
            set_option(params, argv[i], argv[i + 1]);
        }
    } catch (const std::exception &error) {
        fprintf(stderr, "harness: %s\n", error.what());
        return false;
    }
    postprocess_cpu_params(params.cpuparams, nullptr);
    postprocess_cpu_params(params.cpuparams_batch, &params.cpuparams);
    if (!params.kv_overrides.empty()) { // the last one has no key
        params.kv_overrides.emplace_back();
        params.kv_overrides.back().key[0] = 0;
    }
    params.fit_params = false; // looks for the memory of GPUs
    common_log_main();         // made before what is registered here, so that it is still there when that runs
    atexit([] { common_log_flush(common_log_main()); });
    return true;
}

common_params common_base_params_to_speculative(const common_params &) {
    fprintf(stderr, "harness: no draft models here\n");
    abort();
}

int llama_build_number() {
    return 0;
}

const char *llama_commit() {
    return "";
}

const char *llama_compiler() {
    return "";
}

const char *llama_build_target() {
    return "";
}

extern "C" {

llama_context *__real_llama_init_from_model(llama_model *model, llama_context_params params);
llama_context *__wrap_llama_init_from_model(llama_model *model, llama_context_params params);
void __real_llama_free(llama_context *ctx);
void __wrap_llama_free(llama_context *ctx);

llama_context *__wrap_llama_init_from_model(llama_model *model, llama_context_params params) {
    if (params.type_v != GGML_TYPE_F16 && params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    }
    llama_context *ctx = __real_llama_init_from_model(model, params);
    if (!ctx) {
        fprintf(stderr, "harness: no context: %s\n", xquant_llama_error());
        exit(2); // most programs would go on with it
    }
    return ctx;
}

void __wrap_llama_free(llama_context *ctx) {
    xquant_llama_info info;
    if (ctx && xquant_llama_get_info(ctx, &info) == 0) {
        fprintf(stderr, "harness: xquant cache with %d pages sealed, %d open\n", info.pages_sealed, info.pages_open);
    }
    __real_llama_free(ctx);
}
}
