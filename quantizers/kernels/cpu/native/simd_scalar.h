// Sixteen lanes in plain C++: the specification of the others. What each function means is said in simd_avx512.h.
struct V {
    struct F { float lane[16]; };
    struct D { int32_t lane[16]; };
    struct B { uint8_t lane[64]; };
    static constexpr int kWidth = 1, kPair = 0;
    static constexpr int kBlocks = 1;
    static constexpr int kQueries = 1;
    static constexpr int values_at_a_time(int) { return 4; }

    template <class T, class Fn>
    PRECIS_INLINE static T each(Fn fn) {
        T out;
        for (int i = 0; i < 16; i++) out.lane[i] = fn(i);
        return out;
    }
    static F zero() { return set(0); }
    static F set(float x) { return each<F>([&](int) { return x; }); }
    static F load(const float* p) { return each<F>([&](int i) { return p[i]; }); }
    static void store(float* p, const F& x) { std::memcpy(p, x.lane, sizeof x.lane); }
    static F add(const F& a, const F& b) { return each<F>([&](int i) { return a.lane[i] + b.lane[i]; }); }
    static F sub(const F& a, const F& b) { return each<F>([&](int i) { return a.lane[i] - b.lane[i]; }); }
    static F mul(const F& a, const F& b) { return each<F>([&](int i) { return a.lane[i] * b.lane[i]; }); }
    static F div(const F& a, const F& b) { return each<F>([&](int i) { return a.lane[i] / b.lane[i]; }); }
    static F fma(const F& a, const F& b, const F& c) { return each<F>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); }); }
    static F max(const F& a, const F& b) { return each<F>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
    static F min(const F& a, const F& b) { return each<F>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
    static F round(const F& x) { return each<F>([&](int i) { return std::nearbyint(x.lane[i]); }); }
    static F first(int count, const F& x, const F& y) { return each<F>([&](int i) { return i < count ? x.lane[i] : y.lane[i]; }); }
    static F scale2(const F& x, const F& n) {
        return each<F>([&](int i) {
            // What the vector conversion makes of NaN; the product below is NaN whatever the power is.
            const int32_t power = n.lane[i] == n.lane[i] ? static_cast<int32_t>(n.lane[i]) : INT32_MIN;
            const uint32_t bits = (static_cast<uint32_t>(power) + 127u) << 23;
            float scale;
            std::memcpy(&scale, &bits, 4);
            return x.lane[i] * scale;
        });
    }
    static float sum(const F& x) {
        float lane[8];
        for (int i = 0; i < 8; i++) lane[i] = x.lane[i] + x.lane[i + 8];
        for (int i = 0; i < 4; i++) lane[i] = lane[i] + lane[i + 4];
        for (int i = 0; i < 2; i++) lane[i] = lane[i] + lane[i + 2];
        return lane[0] + lane[1];
    }
    static float most(const F& x) {
        const auto larger = [](float a, float b) { return a > b ? a : b; };
        float lane[8];
        for (int i = 0; i < 8; i++) lane[i] = larger(x.lane[i], x.lane[i + 8]);
        for (int i = 0; i < 4; i++) lane[i] = larger(lane[i], lane[i + 4]);
        for (int i = 0; i < 2; i++) lane[i] = larger(lane[i], lane[i + 2]);
        return larger(lane[0], lane[1]);
    }
    static void sum4(const F& a, const F& b, const F& c, const F& d, float* out) {
        out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
    }
    static void sum16(const F (&x)[4][4], float (&out)[4][4]) {
        for (int t = 0; t < 4; t++) sum4(x[t][0], x[t][1], x[t][2], x[t][3], out[t]);
    }
    static D magnitude(const F& x) {
        D out;
        std::memcpy(out.lane, x.lane, sizeof out.lane);
        return each<D>([&](int i) { return out.lane[i] & 0x7fffffff; });
    }
    static D max(const D& a, const D& b) { return each<D>([&](int i) { return std::max(a.lane[i], b.lane[i]); }); }
    static int32_t largest(const D& x) { return *std::max_element(x.lane, x.lane + 16); }

    static D dset(int32_t x) { return each<D>([&](int) { return x; }); }
    static int32_t wrap(uint32_t x) { return static_cast<int32_t>(x); }
    static D dadd(const D& a, const D& b) {
        return each<D>([&](int i) { return wrap(static_cast<uint32_t>(a.lane[i]) + static_cast<uint32_t>(b.lane[i])); });
    }
    static int32_t dsum(const D& x) { return std::accumulate(x.lane, x.lane + 16, 0); }
    static void largest4(const D (&x)[4], int32_t* out) {
        for (int i = 0; i < 4; i++) out[i] = largest(x[i]);
    }
    static void dsum4(const D (&x)[4], int32_t* out) {
        for (int i = 0; i < 4; i++) out[i] = dsum(x[i]);
    }
    static F to_float(const D& x) { return each<F>([&](int i) { return static_cast<float>(x.lane[i]); }); }
    static D to_int(const F& x) { return each<D>([&](int i) { return static_cast<int32_t>(std::nearbyint(x.lane[i])); }); }
    static D clamp8(const D& x) { return each<D>([&](int i) { return std::min(127, std::max(-128, x.lane[i])); }); }
    static constexpr bool kStoresWords = false;
    static void store8(int8_t* p, const D& x) { for (int i = 0; i < 16; i++) p[i] = static_cast<int8_t>(x.lane[i]); }

    static void prefetch_far(const void*) {}
    static void prefetch(const void*) {}
    static B bload(const void* p) {
        B out;
        std::memcpy(out.lane, p, sizeof out.lane);
        return out;
    }
    static void bstore(void* p, const B& x) { std::memcpy(p, x.lane, sizeof x.lane); }
    template <class Fn>
    PRECIS_INLINE static B bytewise(Fn fn) {
        B out;
        for (int i = 0; i < 64; i++) out.lane[i] = static_cast<uint8_t>(fn(i));
        return out;
    }
    static B band(const B& x, uint8_t mask) { return bytewise([&](int i) { return x.lane[i] & mask; }); }
    static B less(const B& a, const B& b) { return bytewise([&](int i) { return a.lane[i] - b.lane[i]; }); }
    static B spread(const void* p) {
        const auto* bytes = static_cast<const uint8_t*>(p);
        return bytewise([&](int i) { return bytes[i / 4] - 128; });
    }
    static B bor(const B& a, const B& b) { return bytewise([&](int i) { return a.lane[i] | b.lane[i]; }); }
    template <int N>
    static B shr(const B& x) { return bytewise([&](int i) { return x.lane[i] >> N; }); }
    template <int N>
    static B shl(const B& x) { return bytewise([&](int i) { return x.lane[i] << N; }); }
    static B word(const void* p) {
        uint8_t bytes[4];
        std::memcpy(bytes, p, 4);
        return bytewise([&](int i) { return bytes[i & 3]; });
    }
    static B low_half(const B& x) { return bytewise([&](int i) { return (i & 2) ? 0 : x.lane[i]; }); }
    template <class T>  // B or D
    static F as_float(const T& x) {
        F out;
        std::memcpy(out.lane, x.lane, sizeof out.lane);
        return out;
    }
    static constexpr bool kCentred = false;
    static const B& centred(const B& x) { return x; }
    static D dot(const D& acc, const B& w, const B& x) {
        return each<D>([&](int i) {
            uint32_t sum = static_cast<uint32_t>(acc.lane[i]);
            for (int b = 0; b < 4; b++) sum += static_cast<uint32_t>(int{w.lane[4 * i + b]} * int{static_cast<int8_t>(x.lane[4 * i + b])});
            return wrap(sum);
        });
    }
    static F dot_bf16(const F& acc, const B& w, const B& x) {
        return each<F>([&](int i) {
            const float odd = flush(std::fma(element(w, 2 * i + 1), element(x, 2 * i + 1), flush(acc.lane[i])));
            return flush(std::fma(element(w, 2 * i), element(x, 2 * i), odd));
        });
    }
    static float element(const B& x, int i) {
        uint16_t bits;
        std::memcpy(&bits, x.lane + 2 * i, 2);
        return flush(from_bf16(bits));
    }
    static float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

    static B table(const void* p) {
        const auto* bytes = static_cast<const uint8_t*>(p);
        return bytewise([&](int i) { return bytes[i & 15]; });
    }
    static B lookup(const B& table, const B& index) { return bytewise([&](int i) { return table.lane[index.lane[i] & 15]; }); }
    static F power(const void* p) {
        return each<F>([&](int i) {
            const uint32_t bits = static_cast<uint32_t>(static_cast<const uint8_t*>(p)[i]) << 23;
            float value;
            std::memcpy(&value, &bits, 4);
            return value;
        });
    }
    static F e4m3(const void* p) { return each<F>([&](int i) { return from_half(half_of_e4m3(static_cast<const uint8_t*>(p)[i])); }); }
    static B e4m3_bf16(const void* p) {
        B out;
        for (int i = 0; i < 32; i++) {
            const uint16_t bits = to_bf16(from_half(half_of_e4m3(static_cast<const uint8_t*>(p)[i])));
            std::memcpy(out.lane + 2 * i, &bits, 2);
        }
        return out;
    }

    static F half(const void* p) {
        uint16_t bits[16];
        std::memcpy(bits, p, sizeof bits);
        return each<F>([&](int i) { return from_half(bits[i]); });
    }
    static F bytes(const void* p) { return each<F>([&](int i) { return static_cast<float>(static_cast<const uint8_t*>(p)[i]); }); }
    static void store_bf16(uint16_t* p, const F& x) { for (int i = 0; i < 16; i++) p[i] = to_bf16(x.lane[i]); }
};
