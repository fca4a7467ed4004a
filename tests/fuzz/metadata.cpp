/* metadata.cpp: fuzz target: plans in GGUF files.
 *
 * An input is a GGUF file.  It is read as the fork does when a model is loaded; a plan that is taken is then given to a
 * tiny model ($XQUANT_FUZZ_MODELS/plain.gguf), of which a context is made: an error, or a context that decodes.
 */
#include "fuzz.h"

#include "gguf.h"
#include "llama-model.h"

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    fuzz::quiet();
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static llama_model *const model = fuzz::load_model("plain");
    gguf_init_params params = {};
    params.no_alloc = true;
    gguf_context *file = gguf_init_from_buffer(data, size, params);
    if (!file) {
        return 0;
    }
    const auto plan = xquant::read_metadata(file, {});
    gguf_free(file);
    if (!plan->present || !plan->error.empty()) {
        return 0;
    }
    model->xq = plan;
    if (fuzz::context context(model, {512, 1, true}); context.ctx) {
        fuzz::check(context.decode(0, 0, 300) == 0, "a context decodes");
    } else {
        fuzz::check(*xquant_llama_error() != '\0', "an error has a message");
    }
    return 0;
}
