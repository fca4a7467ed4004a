/* xquant-metadata.cpp: reads the plan that a GGUF file carries; see xquant-metadata.h for the keys. */
#include "xquant-metadata.h"

#include "xquant-hash.h"

#include "ggml.h"
#include "gguf.h"
#include "llama-model-loader.h"
#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>
#include <stdexcept>

namespace xquant {

namespace {

struct bad_key : std::runtime_error {
    using std::runtime_error::runtime_error;
};

[[noreturn]] void bad(const std::string &key, const std::string &is, const std::string &must) {
    throw bad_key(key + " is " + is + ", must be " + must);
}

template <typename T> constexpr gguf_type type_of = GGUF_TYPE_COUNT;
template <> constexpr gguf_type type_of<int32_t> = GGUF_TYPE_INT32;
template <> constexpr gguf_type type_of<uint32_t> = GGUF_TYPE_UINT32;
template <> constexpr gguf_type type_of<uint16_t> = GGUF_TYPE_UINT16;
template <> constexpr gguf_type type_of<float> = GGUF_TYPE_FLOAT32;
template <> constexpr gguf_type type_of<int8_t> = GGUF_TYPE_BOOL;

/* One file's keys; every reader throws bad_key. */
struct reader {
    const gguf_context *file;

    int64_t find(const std::string &key) const {
        const int64_t id = gguf_find_key(file, key.c_str());
        return id >= 0 ? id : throw bad_key(key + " is missing");
    }

    template <typename T> T number(const std::string &key) const {
        const int64_t id = find(key);
        if (gguf_get_kv_type(file, id) != type_of<T>) {
            bad(key, gguf_type_name(gguf_get_kv_type(file, id)), gguf_type_name(type_of<T>));
        }
        T value;
        memcpy(&value, gguf_get_val_data(file, id), sizeof(value));
        return value;
    }

    int64_t array(const std::string &key, gguf_type type, size_t n) const {
        const int64_t id = find(key);
        const bool is_array = gguf_get_kv_type(file, id) == GGUF_TYPE_ARRAY;
        if (!is_array || gguf_get_arr_type(file, id) != type) {
            bad(key,
                is_array ? std::string("an array of ") + gguf_type_name(gguf_get_arr_type(file, id))
                         : std::string(gguf_type_name(gguf_get_kv_type(file, id))),
                std::string("an array of ") + gguf_type_name(type));
        }
        if (gguf_get_arr_n(file, id) != n) {
            bad(key, std::to_string(gguf_get_arr_n(file, id)) + " entries long", std::to_string(n));
        }
        return id;
    }

    template <typename T> std::vector<T> numbers(const std::string &key, size_t n) const {
        const int64_t id = array(key, type_of<T>, n);
        std::vector<T> values(n);
        if (n > 0) {
            memcpy(values.data(), gguf_get_arr_data(file, id), n * sizeof(T));
        }
        return values;
    }

    /* Entries of a string array as their places in a list of names, which commas separate. */
    std::vector<int32_t> choices(const std::string &key, size_t n, const std::string &names) const {
        const int64_t id = array(key, GGUF_TYPE_STRING, n);
        std::vector<std::string> known;
        std::istringstream list(names);
        for (std::string name; std::getline(list, name, ',');) {
            known.push_back(name);
        }
        std::vector<int32_t> values;
        for (size_t i = 0; i < n; ++i) {
            const std::string text = gguf_get_arr_str(file, id, i);
            const auto choice = std::find(known.begin(), known.end(), text);
            if (choice == known.end()) {
                bad(key + "[" + std::to_string(i) + "]", "\"" + text.substr(0, 64) + "\"", "one of " + names);
            }
            values.push_back((int32_t)(choice - known.begin()));
        }
        return values;
    }
};

void read_sides(const reader &file, const std::string &name, size_t n, std::vector<xq_layer> &layers,
                xq_side xq_layer::*side) {
    const std::string prefix = "xquant." + name + ".";
    const bool is_v = name == "v";
    const auto bits = file.numbers<int32_t>(prefix + "bits", n), group = file.numbers<int32_t>(prefix + "group", n);
    const auto owner = file.numbers<int32_t>(prefix + "owner", n);
    const auto eta = file.numbers<float>(prefix + "eta", n);
    const auto fit = file.choices(prefix + "fit", n, xq_fit_names());
    const auto scale = file.choices(prefix + "scale", n, xq_param_names());
    const auto source = is_v ? file.numbers<int32_t>(prefix + "source", n) : std::vector<int32_t>(n, -1);
    // files that came before keys could be rotated do not say it of them
    const bool known = is_v || gguf_find_key(file.file, (prefix + "rotate").c_str()) >= 0;
    const auto rotate = known ? file.numbers<int8_t>(prefix + "rotate", n) : std::vector<int8_t>(n, 0);
    for (size_t i = 0; i < n; ++i) {
        layers[i].*side = {bits[i], group[i], fit[i], scale[i], rotate[i] != 0, owner[i], source[i], eta[i]};
    }
}

/* Maps and transforms: lengths are compared with the model's shapes when a cache is made; here only the types. */
template <typename T> std::vector<T> numbers_of_any_length(const reader &file, const std::string &key) {
    const int64_t id = gguf_find_key(file.file, key.c_str());
    const bool is_array = id >= 0 && gguf_get_kv_type(file.file, id) == GGUF_TYPE_ARRAY;
    return file.numbers<T>(key, is_array ? gguf_get_arr_n(file.file, id) : 0);
}

std::vector<float> read_halves(const reader &file, const std::string &key) {
    const auto halves = numbers_of_any_length<uint16_t>(file, key);
    std::vector<float> out(halves.size());
    for (size_t i = 0; i < halves.size(); ++i) {
        out[i] = ggml_fp16_to_fp32(halves[i]);
        if (!std::isfinite(out[i])) {
            bad(key + "[" + std::to_string(i) + "]", "not finite", "a finite number");
        }
    }
    return out;
}

void read_keys(const reader &file, metadata &out) {
    const uint32_t version = file.number<uint32_t>("xquant.version");
    if (version != 1) {
        bad("xquant.version", std::to_string(version), "1: another version of xquant_gguf wrote it");
    }
    out.window = file.number<int32_t>("xquant.window");
    out.pinned = file.number<int32_t>("xquant.pinned");
    if (gguf_find_key(file.file, "xquant.open_bits") >= 0) {
        out.open_bits = file.number<int32_t>("xquant.open_bits");
    }
    const int64_t bits = file.find("xquant.k.bits");
    const size_t n = gguf_get_kv_type(file.file, bits) == GGUF_TYPE_ARRAY ? gguf_get_arr_n(file.file, bits) : 0;
    if (n < 1 || n > XQ_MAX_LAYERS) {
        bad("xquant.k.bits", std::to_string(n) + " entries long", "one for each layer of the model");
    }
    out.layers.resize(n);
    read_sides(file, "k", n, out.layers, &xq_layer::k);
    read_sides(file, "v", n, out.layers, &xq_layer::v);
    for (size_t i = 0; i < n; ++i) {
        const std::string number = std::to_string(i), transform = "xquant.transform." + number + ".weight";
        if (out.layers[i].v.source >= 0) {
            const std::string map = "xquant.map." + number;
            out.maps[(int32_t)i] = {numbers_of_any_length<int32_t>(file, map + ".heads"),
                                    read_halves(file, map + ".weight")};
        }
        if (gguf_find_key(file.file, transform.c_str()) >= 0) {
            out.transforms[(int32_t)i] = read_halves(file, transform);
        }
    }
    if (gguf_find_key(file.file, "xquant.calibration.expected_kld") >= 0) {
        out.expected_kld = file.number<float>("xquant.calibration.expected_kld");
        if (!(out.expected_kld >= 0.0 && std::isfinite(out.expected_kld))) {
            bad("xquant.calibration.expected_kld", std::to_string(out.expected_kld), "a number of at least 0");
        }
    }
}

std::string text_of(const std::string &key, const llama_model_kv_override &value) {
    switch (value.tag) {
    case LLAMA_KV_OVERRIDE_TYPE_INT:
        return std::to_string(value.val_i64);
    case LLAMA_KV_OVERRIDE_TYPE_STR:
        return std::string(value.val_str, strnlen(value.val_str, sizeof(value.val_str)));
    default:
        throw std::runtime_error("kv_overrides: " + key + " must be a string or an integer");
    }
}

/* Of how many tensors bytes are read, and how many of each: reads that a disk does in no time. */
constexpr size_t n_samples = 64, sample_bytes = 64;

uint64_t identify(llama_model_loader &loader) {
    hasher hash;
    const size_t step = std::max<size_t>(loader.weights_map.size() / n_samples, 1);
    size_t number = 0;
    for (const auto &[name, weight] : loader.weights_map) {
        const size_t size = ggml_nbytes(weight.tensor);
        hash.add(name.data(), name.size());
        hash.add(&weight.tensor->type, sizeof(weight.tensor->type));
        hash.add(weight.tensor->ne, sizeof(weight.tensor->ne));
        if (number++ % step == 0 && weight.idx < loader.files.size()) {
            uint8_t bytes[sample_bytes] = {};
            const size_t n = std::min(size, sample_bytes);
            loader.files[weight.idx]->seek(weight.offs + (size - n) / 2, SEEK_SET);
            loader.files[weight.idx]->read_raw(bytes, n);
            hash.add(bytes, n);
        }
    }
    return hash.value();
}

/* Of a vector that is read. */
constexpr int64_t most_numbers = 1 << 17;

/* Biases of keys and queries; the frequency factors of RoPE and the weights of keys' norms, where they may say that
 * keys hold the values. */
std::map<std::string, std::vector<float>> read_vectors(llama_model_loader &loader) {
    std::map<std::string, std::vector<float>> out;
    for (const auto &[name, weight] : loader.weights_map) {
        const auto has = [&name = name](const char *part) { return name.find(part) != std::string::npos; };
        const bool shares = loader.get_arch() == LLM_ARCH_GEMMA4 && (has("rope_freqs.weight") || has(".attn_k_norm.")),
                   is_bias = has(".attn_k.bias") || has(".attn_q.bias");
        const ggml_tensor *t = weight.tensor;
        if ((shares || is_bias) && t->type == GGML_TYPE_F32 && ggml_n_dims(t) == 1 && t->ne[0] <= most_numbers &&
            weight.idx < loader.files.size()) {
            std::vector<float> &values = out[name];
            values.resize((size_t)t->ne[0]);
            loader.files[weight.idx]->seek(weight.offs, SEEK_SET);
            loader.files[weight.idx]->read_raw(values.data(), values.size() * sizeof(values[0]));
        }
    }
    return out;
}

} // namespace

metadata read_plan(const gguf_context *file) {
    metadata out;
    out.present = gguf_find_key(file, "xquant.version") >= 0;
    if (out.present) {
        try {
            read_keys({file}, out);
        } catch (const bad_key &error) {
            out.error = error.what();
        }
    }
    return out;
}

metadata read_plan(const void *block, size_t size) {
    gguf_init_params params = {};
    params.no_alloc = true;
    const gguf_context_ptr file(gguf_init_from_buffer(block, size, params));
    metadata out;
    if (file) {
        out = read_plan(file.get());
    }
    if (!out.present) {
        out.present = true;
        out.error = "the plan is not a GGUF block with xquant.version";
    }
    return out;
}

std::map<std::string, std::string> read_overrides(const overrides &given) {
    std::map<std::string, std::string> out;
    for (const auto &[key, value] : given) {
        if (key.rfind("xquant.", 0) == 0) {
            out[key] = text_of(key, value);
        }
    }
    return out;
}

std::shared_ptr<const model_metadata> read_metadata(llama_model_loader &loader) {
    auto out = std::make_shared<model_metadata>();
    out->plan = std::make_shared<metadata>(read_plan(loader.metadata));
    out->given = read_overrides(loader.kv_overrides);
    out->weights = identify(loader);
    out->vectors = read_vectors(loader);
    return out;
}

} // namespace xquant
