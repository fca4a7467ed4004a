/* generate.cpp: continues a prompt greedily with an XQuant cache, prints the tokens and what the cache holds:
 * generate MODEL PROMPT_FILE N_PROMPT N_TOKENS.  Small enough to run on an emulated CPU, unlike llama.cpp's programs.
 */
#include "llama.h"
#include "xquant_llama.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: generate MODEL PROMPT_FILE N_PROMPT N_TOKENS\n");
        return 1;
    }
    const int n_prompt = atoi(argv[3]), n_tokens = atoi(argv[4]), n_batch = 64;
    // nothing but the micro-batch stays F16, so that a short prompt is read from codes
    llama_model_kv_override overrides[3] = {};
    const char *const names[2] = {"xquant.window", "xquant.pinned"};
    for (int i = 0; i < 2; ++i) {
        overrides[i].tag = LLAMA_KV_OVERRIDE_TYPE_INT;
        snprintf(overrides[i].key, sizeof(overrides[i].key), "%s", names[i]);
    }
    llama_model_params load = llama_model_default_params();
    load.kv_overrides = overrides;
    llama_model *model = llama_model_load_from_file(argv[1], load);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 1024;
    params.n_batch = params.n_ubatch = n_batch;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = params.type_v = GGML_TYPE_XQUANT;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    llama_context *ctx = model ? llama_init_from_model(model, params) : nullptr;
    std::ifstream file(argv[2]);
    const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (!ctx || !file || n_prompt + n_tokens > 1024) {
        fprintf(stderr, "generate: %s\n", ctx ? "no prompt, or it is too long" : xquant_llama_error());
        return 1;
    }
    const llama_vocab *vocab = llama_model_get_vocab(model);
    std::vector<llama_token> tokens(3 * text.size() + 8); // a space may become three bytes
    const int n = llama_tokenize(vocab, text.data(), (int)text.size(), tokens.data(), (int)tokens.size(), true, false);
    if (n < n_prompt) {
        fprintf(stderr, "generate: the prompt has %d tokens\n", n);
        return 1;
    }
    for (int i = 0; i < n_prompt; i += n_batch) {
        llama_decode(ctx, llama_batch_get_one(tokens.data() + i, n_prompt - i < n_batch ? n_prompt - i : n_batch));
    }
    for (int i = 0; i < n_tokens; ++i) {
        const float *logits = llama_get_logits_ith(ctx, -1);
        llama_token best = 0;
        for (llama_token t = 1; t < llama_vocab_n_tokens(vocab); ++t) {
            best = logits[t] > logits[best] ? t : best;
        }
        char piece[64];
        const int length = llama_token_to_piece(vocab, best, piece, sizeof(piece), 0, false);
        printf("%d %.3f %.*s\n", best, logits[best], length, piece);
        fflush(stdout);
        llama_decode(ctx, llama_batch_get_one(&best, 1));
    }
    xquant_llama_info info;
    xquant_llama_get_info(ctx, &info);
    printf("%s kernels %llu calls, pages sealed %d, open %d\n", xq_kernels(),
           (unsigned long long)xq_kernels_calls(xq_kernels()), info.pages_sealed, info.pages_open);
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
