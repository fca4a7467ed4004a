/* metadata.cpp: fuzz target: plans in GGUF files.
 *
 * An input is a GGUF block.  It is read as the fork does when a model is loaded or a plan handed over; a plan that is
 * taken is then given to a tiny model ($XQUANT_FUZZ_MODELS/plain.gguf), of which a context is made: an error, or a
 * context that decodes.
 */
#include "fuzz.h"

#include "llama-model.h"

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    fuzz::quiet();
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static llama_model *const model = fuzz::load_model("plain");
    auto file = std::make_shared<xquant::model_metadata>(*model->xq);
    file->plan = std::make_shared<xquant::metadata>(xquant::read_plan(data, size));
    if (!file->plan->error.empty()) {
        return 0;
    }
    model->xq = file;
    if (fuzz::context context(model, {512, 1, true}); context.ctx) {
        fuzz::check(context.decode(0, 0, 300) == 0, "a context decodes");
    } else {
        fuzz::check(*xquant_llama_error() != '\0', "an error has a message");
    }
    return 0;
}
