// Runs products and whole steps by each named instruction set and compares all results with the first one's, bit for bit. Prints each case
// with a digest of its results, which say whether another machine computes the same. Knows the kernels by their C interface only.
//
//     native_bits scalar neon
//
// Without a name it says which set this processor gets.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "api.h"
#include "step.h"

extern "C" {
const char* precis_isa();
int precis_select_isa(const char* name);
int precis_pack(const precis::Source* source, const precis::Matrix* m, uint8_t* out, int threads);
int precis_linear(const precis::Matrix* m, const float* x, int tokens, float* y, int threads);
void* precis_step_new(const precis::Model* model);
void precis_step_free(void* step);
int precis_step_forward(void* step, const precis::Batch* batch, int threads);
}

using namespace precis;

namespace {

uint64_t g_state = 1;

uint32_t word() {  // splitmix64
    uint64_t x = g_state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u, x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(x >> 32);
}

float of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

float number() { return static_cast<float>(static_cast<int32_t>(word()) >> 8) * 0x1p-23f; }  // in [-1, 1), on any machine the same
float wild() { return of_bits((word() & 0x807fffffu) | (word() % 255) << 23); }            // any magnitude
// Subnormal, or so small that a product of two is about the smallest normal number.
float small() { return of_bits((word() & 0x807fffffu) | (word() % 8 ? 58 + word() % 12 : 0) << 23); }

std::vector<float> numbers(int64_t count, float factor = 1.0f) {
    std::vector<float> out(static_cast<size_t>(count));
    for (float& x : out) x = number() * factor;
    return out;
}

// An fp16 between 2^-8 and 1, or, seldom, zero or subnormal.
uint16_t half() { return static_cast<uint16_t>((word() & 0x83ffu) | (word() % 16 ? 7 + word() % 8 : 0) << 10); }

// A matrix with random content, and the memory that it lies in.
struct Weight {
    Matrix m;
    std::vector<uint64_t> memory;
    std::vector<float> bias;

    Weight(Kind kind, int bits, int group, Zero zero, int64_t rows, int64_t columns, bool tiny = false)
        : m{kind, bits, group ? group : static_cast<int>(columns), zero, rows, columns, nullptr, nullptr}, bias(numbers(rows)) {
        const auto count = static_cast<size_t>(rows * columns);
        const bool dense = kind == Kind::kBf16 || kind == Kind::kFp32;
        const size_t size = dense ? count * (kind == Kind::kBf16 ? 2 : 4) : static_cast<size_t>(matrix_bytes(m));
        memory.resize((size + 4096) / 8 + 16);
        uint8_t* p = bytes();
        if (dense) {
            const int wide = kind == Kind::kBf16 ? 2 : 4;
            for (size_t i = 0; i < count; i++) {
                const float x = tiny ? small() : number();
                std::memcpy(p + i * static_cast<size_t>(wide), reinterpret_cast<const uint8_t*>(&x) + 4 - wide, static_cast<size_t>(wide));
            }
        } else if (kind == Kind::kE4m3) {
            for (size_t i = 0; i < count; i++) p[i] = static_cast<uint8_t>(word());
            auto* scales = reinterpret_cast<float*>(p + e4m3_scales(m));
            for (int64_t r = 0; r < rows; r++) scales[r] = number();
        } else {
            pack_random(p);
        }
        m.data = p, m.bias = tiny ? nullptr : bias.data();
    }
    Weight(const Weight&) = delete;

private:
    uint8_t* bytes() { return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64); }

    void pack_random(uint8_t* out) {
        const auto scales = static_cast<size_t>(m.rows * (m.columns / m.group));
        std::vector<uint8_t> codes(static_cast<size_t>(m.rows * m.columns * m.bits / 8)), zeros(scales), exponents(2 * scales);
        std::vector<uint16_t> halves(scales), minimums(scales);
        for (uint8_t& x : codes) x = static_cast<uint8_t>(word());
        for (uint8_t& x : zeros) x = static_cast<uint8_t>(word() % (1u << m.bits));
        for (uint8_t& x : exponents) x = static_cast<uint8_t>(m.kind == Kind::kCodebookPower ? word() % 12 ? 118 + word() % 9 : 0 : word());
        for (uint16_t& x : halves) x = half();
        for (uint16_t& x : minimums) x = half();
        uint8_t header[kHeader] = {};
        for (int i = 0; i < 16; i++) header[i] = static_cast<uint8_t>(word());
        const float factor = 0.01f;
        std::memcpy(header + 16, &factor, 4);
        const bool halves_scale = m.kind != Kind::kCodebookPower && m.kind != Kind::kCodebookHalves;
        const void* scale = halves_scale ? static_cast<const void*>(halves.data()) : exponents.data();
        const Source source{codes.data(), m.columns * m.bits / 8, 0, scale, zeros.data(), minimums.data(), header};
        precis_pack(&source, &m, out, 1);
    }
};

// Bits of floats, all NaN alike: what sign a NaN has is the processor's choice.
std::vector<uint32_t> bits_of(const std::vector<float>& x) {
    std::vector<uint32_t> out(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        std::memcpy(&out[i], &x[i], 4);
        if (x[i] != x[i]) out[i] = 0x7fc00000u;
    }
    return out;
}

std::vector<std::string> g_sets;
int g_wrong = 0, g_cases = 0;

void check(const std::string& name, const std::function<std::vector<uint32_t>()>& run) {
    std::vector<uint32_t> expected;
    for (const std::string& set : g_sets) {
        precis_select_isa(set.c_str());
        const std::vector<uint32_t> found = run();
        if (expected.empty()) expected = found;
        size_t at = 0;
        while (at < found.size() && found[at] == expected[at]) at++;
        if (at == found.size()) continue;
        std::printf("WRONG %s: %s has %08x at %zu of %zu, %s %08x\n", name.c_str(), set.c_str(), found[at], at, found.size(), g_sets[0].c_str(),
                    expected[at]);
        g_wrong++;
    }
    uint64_t digest = 14695981039346656037u;  // FNV-1a
    for (uint32_t x : expected) digest = (digest ^ x) * 1099511628211u;
    std::printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(digest));
    g_cases++;
}

enum class Input { kPlain, kWild, kSmall, kNotFinite };

void check_products(const std::string& name, const Weight& w, Input input) {
    const int64_t columns = w.m.columns;
    for (int tokens = 1; tokens <= 17; tokens++) {
        std::vector<float> x = numbers(tokens * columns, 4.0f);
        for (int64_t i = 0; i < tokens * columns; i++) {
            float& value = x[static_cast<size_t>(i)];
            if (i / 32 % 7 == 3) value = 0.0f;  // groups of nothing
            if (input == Input::kWild) value = wild();
            if (input == Input::kSmall) value = small();
            if (input == Input::kNotFinite && i % (2 * columns) == 5) value = i % (4 * columns) < columns ? NAN : -INFINITY;
        }
        check(name + " x" + std::to_string(tokens), [&] {
            std::vector<float> y(static_cast<size_t>(tokens * w.m.rows));
            precis_linear(&w.m, x.data(), tokens, y.data(), 1);
            return bits_of(y);
        });
    }
}

void products() {
    const auto every_input = [](const std::string& name, Kind kind, int bits, int group, Zero zero, int64_t rows, int64_t columns) {
        const Weight w(kind, bits, group, zero, rows, columns), few(kind, bits, group, zero, 5, columns, true);
        check_products(name, w, Input::kPlain);
        check_products(name + " wild", few, Input::kWild);
        check_products(name + " small", few, Input::kSmall);
        check_products(name + " not finite", few, Input::kNotFinite);
    };
    for (int bits : {2, 3, 4, 8})
        for (int group : {32, 64, 0})
            for (Zero zero : {Zero::kNone, Zero::kInteger, Zero::kMinimum}) {
                const std::string form = std::to_string(bits) + " bits, group " + std::to_string(group) + ", zero " + std::to_string(static_cast<int>(zero));
                every_input("grouped, " + form, Kind::kGrouped, bits, group, zero, 50, 192);
                every_input("int8 tokens, " + form, Kind::kGroupedToken, bits, group, zero, 39, 128);
            }
    every_input("w8a8", Kind::kToken, 8, 0, Zero::kNone, 50, 160);
    every_input("nf4", Kind::kCodebook, 4, 64, Zero::kNone, 50, 192);
    every_input("mxfp4", Kind::kCodebookPower, 4, 32, Zero::kNone, 50, 160);
    every_input("nvfp4", Kind::kCodebookHalves, 4, 32, Zero::kNone, 50, 160);
    every_input("e4m3", Kind::kE4m3, 8, 0, Zero::kNone, 23, 160);
    every_input("bf16", Kind::kBf16, 16, 0, Zero::kNone, 23, 160);
    every_input("fp32", Kind::kFp32, 32, 0, Zero::kNone, 23, 160);
}

struct Shape {
    std::string name;
    int heads, kv_heads, head_dim;
    int64_t window;
    bool norms;
    CacheKind cache;
    std::function<Weight*(int64_t rows, int64_t columns)> linear;
};

// A decoder of two layers with random weights.
struct Decoder {
    static constexpr int64_t kHidden = 64, kIntermediate = 96, kVocab = 83, kPositions = 256, kBlocks = 40;
    std::vector<Weight*> weights;
    std::vector<Layer> layers;
    Weight head, embedding;
    std::vector<float> norm, head_norm, cos, sin;
    Model model;

    explicit Decoder(const Shape& s)
        : head(Kind::kGrouped, 8, 32, Zero::kNone, kVocab, kHidden), embedding(Kind::kBf16, 16, 0, Zero::kNone, kVocab, kHidden), norm(numbers(kHidden)),
          head_norm(numbers(s.head_dim)), cos(numbers(kPositions * s.head_dim / 2)), sin(numbers(kPositions * s.head_dim / 2)) {
        const auto linear = [&](int64_t rows, int64_t columns) {
            weights.push_back(s.linear(rows, columns));
            return weights.back()->m;
        };
        const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
        const float* of_head = s.norms ? head_norm.data() : nullptr;
        for (int l = 0; l < 2; l++)
            layers.push_back({linear(q, kHidden), linear(kv, kHidden), linear(kv, kHidden), linear(kHidden, q), linear(kIntermediate, kHidden),
                              linear(kIntermediate, kHidden), linear(kHidden, kIntermediate), norm.data(), norm.data(), of_head, of_head, s.window});
        const bool table = s.norms;  // an embedding in bytes for these, in bf16 for the others
        model = {2, kHidden, s.heads, s.kv_heads, s.head_dim, kIntermediate, kVocab, 0, s.cache, 1e-5f, 0.25f, table ? nullptr : embedding.m.data,
                 norm.data(), head.m, table ? head.m : Matrix{}, layers.data()};
    }
    Decoder(const Decoder&) = delete;
    ~Decoder() { for (Weight* w : weights) delete w; }
};

// Two sequences: a prompt of each, then one token of each, then a few of one and one of the other. All logits, and the cache at the end.
std::vector<uint32_t> run_steps(const Decoder& d) {
    const CacheShape shape{2, Decoder::kBlocks, d.model.kv_heads, d.model.head_dim, d.model.cache_kind};
    std::vector<uint64_t> cache(static_cast<size_t>(2 * Decoder::kBlocks * shape.block_bytes() / 8 + 8), ~uint64_t{0});  // NaN where nothing was written
    void* step = precis_step_new(&d.model);
    std::vector<int32_t> table(32);  // [2 sequences][16]
    for (int i = 0; i < 32; i++) table[static_cast<size_t>(i)] = (i * 7 + 3) % Decoder::kBlocks;
    std::vector<uint32_t> all;
    int length[2] = {0, 0};
    for (const auto& counts : std::vector<std::vector<int>>{{150, 21}, {1, 1}, {1, 1}, {9, 1}, {1, 8}, {1, 0}}) {
        std::vector<int32_t> id, position, start{0}, rows;
        for (size_t s = 0; s < 2; s++) {
            if (counts[s] == 0) continue;
            for (int i = 0; i < counts[s]; i++) position.push_back(length[s]++), id.push_back(static_cast<int32_t>(position.size() * 31 % Decoder::kVocab));
            start.push_back(static_cast<int32_t>(id.size()));
        }
        for (size_t i = 0; i < id.size(); i++) rows.push_back(static_cast<int32_t>(i));
        std::vector<float> logits(id.size() * Decoder::kVocab);
        std::vector<int32_t> largest(id.size());
        const auto count = static_cast<int64_t>(id.size());
        const Batch batch{count, static_cast<int64_t>(start.size()) - 1, 16, count, Decoder::kBlocks, Decoder::kPositions, id.data(), position.data(),
                          start.data(), table.data(), rows.data(), d.cos.data(), d.sin.data(), reinterpret_cast<uint8_t*>(cache.data()), logits.data(),
                          largest.data()};
        if (precis_step_forward(step, &batch, 1) != 0) std::printf("WRONG a step was refused\n"), g_wrong++;
        for (uint32_t x : bits_of(logits)) all.push_back(x);
        for (int32_t x : largest) all.push_back(static_cast<uint32_t>(x));
    }
    precis_step_free(step);
    for (uint64_t x : cache) all.push_back(static_cast<uint32_t>(x)), all.push_back(static_cast<uint32_t>(x >> 32));
    return all;
}

void steps() {
    const auto kind = [](Kind k, int bits, int group, Zero zero) {
        return [=](int64_t rows, int64_t columns) { return new Weight(k, bits, group, zero, rows, columns); };
    };
    for (CacheKind cache : {CacheKind::kBf16, CacheKind::kFp32, CacheKind::kInt8})
        for (const Shape& s : {Shape{"w4g32m", 4, 2, 16, 0, false, cache, kind(Kind::kGrouped, 4, 32, Zero::kMinimum)},
                               Shape{"w8z, seven heads a key", 7, 1, 32, 0, true, cache, kind(Kind::kGrouped, 8, 0, Zero::kInteger)},
                               Shape{"w8a8, window", 2, 2, 80, 37, false, cache, kind(Kind::kToken, 8, 0, Zero::kNone)},
                               Shape{"nvfp4", 6, 2, 48, 0, true, cache, kind(Kind::kCodebookHalves, 4, 32, Zero::kNone)},
                               Shape{"e4m3", 4, 4, 16, 0, false, cache, kind(Kind::kE4m3, 8, 0, Zero::kNone)},
                               Shape{"bf16, sixteen heads a key", 16, 1, 16, 90, false, cache, kind(Kind::kBf16, 16, 0, Zero::kNone)},
                               Shape{"fp32", 4, 2, 64, 0, true, cache, kind(Kind::kFp32, 32, 0, Zero::kNone)}}) {
            const Decoder decoder(s);
            check("step, " + s.name + ", cache " + std::to_string(static_cast<int>(cache)), [&] { return run_steps(decoder); });
        }
}

}  // namespace

int main(int count, char** names) {
    if (count == 1) return std::puts(precis_isa()), 0;
    for (int i = 1; i < count; i++) {
        if (!precis_select_isa(names[i]) || std::string(precis_isa()) != names[i]) return std::printf("%s cannot run here\n", names[i]), 2;
        g_sets.emplace_back(names[i]);
    }
    products();
    steps();
    std::fprintf(stderr, "%d cases, %d wrong\n", g_cases, g_wrong);
    return g_wrong != 0;
}
