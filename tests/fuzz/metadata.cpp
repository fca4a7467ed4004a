/* metadata.cpp: reads damaged plans, many of them.  usage: metadata SEED.gguf COUNT [RANDOM]
 *
 * Each try damages a copy of the seed in one to eight places, mostly one (bytes, lengths, numbers at their limits,
 * blocks moved, the end cut off) and reads it as the fork does when a model is loaded, then checks the plan as it does
 * when a cache is made.  Built with AddressSanitizer and UndefinedBehaviorSanitizer: any bad access ends the program.
 */
#include "kernels.h"
#include "xquant-metadata.h"

#include "gguf.h"
#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>

/* Of libxquant, where it is hidden; nobody reads the messages here. */
int xq::fail(int status, const char *, ...) {
    return status;
}

using bytes = std::vector<uint8_t>;

static void damage(bytes &data, std::mt19937_64 &random) {
    static const uint64_t limits[] = {0,
                                      1,
                                      3,
                                      4,
                                      127,
                                      128,
                                      255,
                                      1024,
                                      1025,
                                      0x7fffffff,
                                      0x80000000,
                                      0xffffffff,
                                      0x7fffffffffffffff,
                                      0x8000000000000000,
                                      0xffffffffffffffff};
    const auto any = [&](size_t n) { return (size_t)(random() % n); };
    const size_t at = any(data.size());
    switch (any(5)) {
    case 0:
        data[at] = (uint8_t)random();
        break;
    case 1:
        data[at] ^= (uint8_t)(1u << any(8));
        break;
    case 2: {
        const uint64_t value = limits[any(std::size(limits))];
        memcpy(&data[at], &value, std::min<size_t>(any(2) ? 8 : 4, data.size() - at));
        break;
    }
    case 3: {
        const size_t from = any(data.size()), n = std::min({any(64) + 1, data.size() - at, data.size() - from});
        memmove(&data[at], &data[from], n);
        break;
    }
    default:
        if (any(8) == 0) {
            data.resize(at + 1);
        }
    }
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: metadata SEED.gguf COUNT [RANDOM]\n");
        return 2;
    }
    std::ifstream file(argv[1], std::ios::binary);
    const bytes seed((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (seed.empty()) {
        fprintf(stderr, "%s is empty, or cannot be read\n", argv[1]);
        return 2;
    }
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    std::mt19937_64 random(argc > 3 ? strtoull(argv[3], nullptr, 10) : 1);
    long counts[4] = {}; /* not a GGUF file, no plan, a plan that is refused, a plan that is taken */
    const long n = strtol(argv[2], nullptr, 10);
    for (long i = 0; i < n; ++i) {
        bytes data = seed;
        for (uint64_t k = random() % 2 ? 1 : random() % 8 + 1; k > 0; --k) {
            damage(data, random);
        }
        gguf_init_params params = {};
        params.no_alloc = true;
        gguf_context *context = gguf_init_from_buffer(data.data(), data.size(), params);
        if (!context) {
            counts[0]++;
            continue;
        }
        const auto plan = xquant::read_metadata(context, {});
        gguf_free(context);
        if (!plan->present || !plan->error.empty()) {
            counts[plan->present ? 2 : 1]++;
            continue;
        }
        auto checked = std::make_unique<xq_plan>();
        checked->n_layers = (int32_t)plan->layers.size();
        checked->window = plan->window;
        checked->pinned = plan->pinned;
        std::copy(plan->layers.begin(), plan->layers.end(), checked->layers);
        const std::vector<int32_t> width(plan->layers.size(), 64);
        counts[xq_plan_check(checked.get(), width.data(), width.data()) == XQ_OK ? 3 : 2]++;
    }
    printf("%ld tries: %ld no GGUF file, %ld without a plan, %ld refused, %ld taken\n", n, counts[0], counts[1],
           counts[2], counts[3]);
    return 0;
}
