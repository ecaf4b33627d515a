// Sixteen lanes in four registers: NEON with the dot products of ARMv8.2. What each function means is said in simd_avx512.h.
struct V {
    struct F { float32x4_t part[4]; };
    struct D { int32x4_t part[4]; };
    struct B { uint8x16_t part[4]; };
    // Three tokens' sums and totals are 24 of the 32 registers; three queries' two sums as many.
    static constexpr int kWidth = 3, kPair = 0;
    static constexpr int kBlocks = 1;
    static constexpr int kQueries = 3;
    static constexpr int values_at_a_time(int queries) { return queries <= 2 ? 2 : 1; }

    template <class T, class Fn>
    PRECIS_INLINE static T each(Fn fn) { return {{fn(0), fn(1), fn(2), fn(3)}}; }
    PRECIS_INLINE static uint32x4_t bits(float32x4_t x) { return vreinterpretq_u32_f32(x); }
    PRECIS_INLINE static float32x4_t floats(uint32x4_t x) { return vreinterpretq_f32_u32(x); }

    PRECIS_INLINE static F zero() { return set(0); }
    PRECIS_INLINE static F set(float x) { return each<F>([&](int) { return vdupq_n_f32(x); }); }
    PRECIS_INLINE static F load(const float* p) { return each<F>([&](int i) { return vld1q_f32(p + 4 * i); }); }
    PRECIS_INLINE static void store(float* p, const F& x) { PRECIS_UNROLL for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.part[i]); }
    PRECIS_INLINE static F add(const F& a, const F& b) { return each<F>([&](int i) { return vaddq_f32(a.part[i], b.part[i]); }); }
    PRECIS_INLINE static F sub(const F& a, const F& b) { return each<F>([&](int i) { return vsubq_f32(a.part[i], b.part[i]); }); }
    PRECIS_INLINE static F mul(const F& a, const F& b) { return each<F>([&](int i) { return vmulq_f32(a.part[i], b.part[i]); }); }
    PRECIS_INLINE static F div(const F& a, const F& b) { return each<F>([&](int i) { return vdivq_f32(a.part[i], b.part[i]); }); }
    PRECIS_INLINE static F fma(const F& a, const F& b, const F& c) {
        return each<F>([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
    }
    // By comparison: NEON's own give NaN where either is NaN.
    PRECIS_INLINE static float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
    PRECIS_INLINE static F max(const F& a, const F& b) { return each<F>([&](int i) { return larger(a.part[i], b.part[i]); }); }
    PRECIS_INLINE static F min(const F& a, const F& b) {
        return each<F>([&](int i) { return vbslq_f32(vcltq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]); });
    }
    PRECIS_INLINE static F round(const F& x) { return each<F>([&](int i) { return vrndnq_f32(x.part[i]); }); }
    PRECIS_INLINE static F first(int count, const F& x, const F& y) {
        const int32x4_t lanes = {0, 1, 2, 3};
        return each<F>([&](int i) { return vbslq_f32(vcltq_s32(lanes, vdupq_n_s32(count - 4 * i)), x.part[i], y.part[i]); });
    }
    PRECIS_INLINE static F scale2(const F& x, const F& n) {
        return each<F>([&](int i) {
            const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.part[i]), vdupq_n_s32(127)), 23);
            return vmulq_f32(x.part[i], vreinterpretq_f32_s32(power));
        });
    }
    PRECIS_INLINE static float32x4_t quarter(const F& x) {
        return vaddq_f32(vaddq_f32(x.part[0], x.part[2]), vaddq_f32(x.part[1], x.part[3]));
    }
    PRECIS_INLINE static float sum(const F& x) {
        const float32x4_t four = quarter(x);
        return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
    }
    PRECIS_INLINE static float most(const F& x) {
        const float32x4_t four = larger(larger(x.part[0], x.part[2]), larger(x.part[1], x.part[3]));
        const float32x4_t two = larger(four, vextq_f32(four, four, 2));
        return vgetq_lane_f32(larger(two, vdupq_laneq_f32(two, 1)), 0);
    }
    PRECIS_INLINE static float32x4_t halves_added(float32x4_t a, float32x4_t b) {
        const float64x2_t x = vreinterpretq_f64_f32(a), y = vreinterpretq_f64_f32(b);
        return vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(x, y)), vreinterpretq_f32_f64(vzip2q_f64(x, y)));
    }
    PRECIS_INLINE static void sum4(const F& a, const F& b, const F& c, const F& d, float* out) {
        vst1q_f32(out, vpaddq_f32(halves_added(quarter(a), quarter(b)), halves_added(quarter(c), quarter(d))));
    }
    PRECIS_INLINE static void sum16(const F (&x)[4][4], float (&out)[4][4]) {
        PRECIS_UNROLL for (int t = 0; t < 4; t++) sum4(x[t][0], x[t][1], x[t][2], x[t][3], out[t]);
    }
    PRECIS_INLINE static D magnitude(const F& x) {
        return each<D>([&](int i) { return vreinterpretq_s32_f32(vabsq_f32(x.part[i])); });
    }
    PRECIS_INLINE static D max(const D& a, const D& b) { return each<D>([&](int i) { return vmaxq_s32(a.part[i], b.part[i]); }); }
    PRECIS_INLINE static int32_t largest(const D& x) {
        return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.part[0], x.part[1]), vmaxq_s32(x.part[2], x.part[3])));
    }

    PRECIS_INLINE static D dset(int32_t x) { return each<D>([&](int) { return vdupq_n_s32(x); }); }
    PRECIS_INLINE static D dadd(const D& a, const D& b) { return each<D>([&](int i) { return vaddq_s32(a.part[i], b.part[i]); }); }
    PRECIS_INLINE static int32_t dsum(const D& x) {
        return vaddvq_s32(vaddq_s32(vaddq_s32(x.part[0], x.part[1]), vaddq_s32(x.part[2], x.part[3])));
    }
    PRECIS_INLINE static void largest4(const D (&x)[4], int32_t* out) {
        for (int i = 0; i < 4; i++) out[i] = largest(x[i]);
    }
    PRECIS_INLINE static void dsum4(const D (&x)[4], int32_t* out) {
        for (int i = 0; i < 4; i++) out[i] = dsum(x[i]);
    }
    PRECIS_INLINE static F to_float(const D& x) { return each<F>([&](int i) { return vcvtq_f32_s32(x.part[i]); }); }
    PRECIS_INLINE static D to_int(const F& x) { return each<D>([&](int i) { return vcvtnq_s32_f32(x.part[i]); }); }
    PRECIS_INLINE static D clamp8(const D& x) {
        return each<D>([&](int i) { return vmaxq_s32(vminq_s32(x.part[i], vdupq_n_s32(127)), vdupq_n_s32(-128)); });
    }
    static constexpr bool kStoresWords = false;
    PRECIS_INLINE static void store8(int8_t* p, const D& x) {
        const auto low_halves = [&](int i) { return vuzp1q_s16(vreinterpretq_s16_s32(x.part[i]), vreinterpretq_s16_s32(x.part[i + 1])); };
        vst1q_s8(p, vuzp1q_s8(vreinterpretq_s8_s16(low_halves(0)), vreinterpretq_s8_s16(low_halves(2))));
    }

    PRECIS_INLINE static void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
    PRECIS_INLINE static void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
    PRECIS_INLINE static B bload(const void* p) {
        return each<B>([&](int i) { return vld1q_u8(static_cast<const uint8_t*>(p) + 16 * i); });
    }
    PRECIS_INLINE static void bstore(void* p, const B& x) {
        PRECIS_UNROLL for (int i = 0; i < 4; i++) vst1q_u8(static_cast<uint8_t*>(p) + 16 * i, x.part[i]);
    }
    PRECIS_INLINE static B band(const B& x, uint8_t mask) { return each<B>([&](int i) { return vandq_u8(x.part[i], vdupq_n_u8(mask)); }); }
    PRECIS_INLINE static B less(const B& a, const B& b) { return each<B>([&](int i) { return vsubq_u8(a.part[i], b.part[i]); }); }
    PRECIS_INLINE static B spread(const void* p) {
        const uint8x16_t offset = veorq_u8(vld1q_u8(static_cast<const uint8_t*>(p)), vdupq_n_u8(128));
        const uint8x16_t rows = vshrq_n_u8(vcombine_u8(vcreate_u8(0x0706050403020100), vcreate_u8(0x0f0e0d0c0b0a0908)), 2);
        return each<B>([&](int i) { return vqtbl1q_u8(offset, vaddq_u8(rows, vdupq_n_u8(static_cast<uint8_t>(4 * i)))); });
    }
    PRECIS_INLINE static B bor(const B& a, const B& b) { return each<B>([&](int i) { return vorrq_u8(a.part[i], b.part[i]); }); }
    template <int N>
    PRECIS_INLINE static B shr(const B& x) { return each<B>([&](int i) { return vshrq_n_u8(x.part[i], N); }); }
    template <int N>
    PRECIS_INLINE static B shl(const B& x) { return each<B>([&](int i) { return vshlq_n_u8(x.part[i], N); }); }
    PRECIS_INLINE static B word(const void* p) {
        uint32_t x;
        std::memcpy(&x, p, 4);
        return each<B>([&](int) { return vreinterpretq_u8_u32(vdupq_n_u32(x)); });
    }
    PRECIS_INLINE static B low_half(const B& x) {
        return each<B>([&](int i) { return vandq_u8(x.part[i], vreinterpretq_u8_u32(vdupq_n_u32(0xffff))); });
    }
    PRECIS_INLINE static F as_float(const B& x) { return each<F>([&](int i) { return vreinterpretq_f32_u8(x.part[i]); }); }
    PRECIS_INLINE static F as_float(const D& x) { return each<F>([&](int i) { return vreinterpretq_f32_s32(x.part[i]); }); }

    // ARMv8.2 has dot products of two signs or of none.
    static constexpr bool kCentred = true;
    PRECIS_INLINE static B centred(const B& x) { return each<B>([&](int i) { return veorq_u8(x.part[i], vdupq_n_u8(128)); }); }
    PRECIS_INLINE static D dot(const D& acc, const B& w, const B& x) {
        return each<D>([&](int i) { return vdotq_s32(acc.part[i], vreinterpretq_s8_u8(w.part[i]), vreinterpretq_s8_u8(x.part[i])); });
    }
    PRECIS_INLINE static F dot_bf16(const F& acc, const B& w, const B& x) {
        return each<F>([&](int i) {
            const uint32x4_t a = vreinterpretq_u32_u16(flush(vreinterpretq_u16_u8(w.part[i]))), b = vreinterpretq_u32_u8(x.part[i]);
            const uint32x4_t odd = vdupq_n_u32(0xffff0000);
            const float32x4_t sum = flush(vfmaq_f32(acc.part[i], floats(vandq_u32(a, odd)), floats(vandq_u32(b, odd))));
            return flush(vfmaq_f32(sum, floats(vshlq_n_u32(a, 16)), floats(vshlq_n_u32(b, 16))));
        });
    }
    // Subnormals to a zero of their sign. The processor's own mode would also flush what rounding makes normal.
    PRECIS_INLINE static float32x4_t flush(float32x4_t x) {
        const uint32x4_t normal = vtstq_u32(bits(x), vdupq_n_u32(0x7f800000));
        return floats(vandq_u32(bits(x), vorrq_u32(normal, vdupq_n_u32(0x80000000))));
    }
    PRECIS_INLINE static uint16x8_t flush(uint16x8_t x) {
        return vandq_u16(x, vorrq_u16(vtstq_u16(x, vdupq_n_u16(0x7f80)), vdupq_n_u16(0x8000)));
    }

    PRECIS_INLINE static B table(const void* p) { return each<B>([&](int) { return vld1q_u8(static_cast<const uint8_t*>(p)); }); }
    PRECIS_INLINE static B lookup(const B& table, const B& index) {
        return each<B>([&](int i) { return vqtbl1q_u8(table.part[i], index.part[i]); });
    }
    struct Wide { uint16x8_t low, high; };  // 16 bytes as words
    PRECIS_INLINE static Wide widen(const void* p) {
        const uint8x16_t x = vld1q_u8(static_cast<const uint8_t*>(p));
        return {vmovl_u8(vget_low_u8(x)), vmovl_high_u8(x)};
    }
    PRECIS_INLINE static D wider(const Wide& x) {
        const auto whole = [](uint32x4_t part) { return vreinterpretq_s32_u32(part); };
        return {{whole(vmovl_u16(vget_low_u16(x.low))), whole(vmovl_high_u16(x.low)), whole(vmovl_u16(vget_low_u16(x.high))),
                 whole(vmovl_high_u16(x.high))}};
    }
    PRECIS_INLINE static F power(const void* p) {
        const D x = wider(widen(p));
        return each<F>([&](int i) { return vreinterpretq_f32_s32(vshlq_n_s32(x.part[i], 23)); });
    }
    PRECIS_INLINE static F of_halves(uint16x8_t low, uint16x8_t high) {
        const float16x8_t a = vreinterpretq_f16_u16(low), b = vreinterpretq_f16_u16(high);
        return {{vcvt_f32_f16(vget_low_f16(a)), vcvt_high_f32_f16(a), vcvt_f32_f16(vget_low_f16(b)), vcvt_high_f32_f16(b)}};
    }
    PRECIS_INLINE static F e4m3(const void* p) {
        const auto half = [](uint16x8_t x) {
            const uint16x8_t sign = vshlq_n_u16(vandq_u16(x, vdupq_n_u16(0x80)), 8);
            return vorrq_u16(sign, vshlq_n_u16(vandq_u16(x, vdupq_n_u16(0x7f)), 7));
        };
        const Wide x = widen(p);
        return of_halves(half(x.low), half(x.high));
    }
    PRECIS_INLINE static B e4m3_bf16(const void* p) {
        const auto* bytes = static_cast<const uint8_t*>(p);
        const F first = e4m3(bytes), last = e4m3(bytes + 16);
        return {{upper_halves(first.part[0], first.part[1]), upper_halves(first.part[2], first.part[3]),
                 upper_halves(last.part[0], last.part[1]), upper_halves(last.part[2], last.part[3])}};
    }
    // The upper 16 bits of each float, in order: exact for numbers that bf16 holds.
    PRECIS_INLINE static uint8x16_t upper_halves(float32x4_t a, float32x4_t b) {
        return vreinterpretq_u8_u16(vuzp2q_u16(vreinterpretq_u16_f32(a), vreinterpretq_u16_f32(b)));
    }

    PRECIS_INLINE static F half(const void* p) {
        const auto* bytes = static_cast<const uint8_t*>(p);
        return of_halves(vreinterpretq_u16_u8(vld1q_u8(bytes)), vreinterpretq_u16_u8(vld1q_u8(bytes + 16)));
    }
    PRECIS_INLINE static F bytes(const void* p) { return to_float(wider(widen(p))); }
    // As `to_bf16`.
    PRECIS_INLINE static void store_bf16(uint16_t* p, const F& x) {
        const auto rounded = [&](int i) {
            const uint32x4_t all = bits(x.part[i]), odd = vandq_u32(vshrq_n_u32(all, 16), vdupq_n_u32(1));
            const uint32x4_t nearest = vaddq_u32(all, vaddq_u32(odd, vdupq_n_u32(0x7fff))), quiet = vorrq_u32(all, vdupq_n_u32(0x400000));
            const uint32x4_t number = vbslq_u32(vceqq_f32(x.part[i], x.part[i]), nearest, quiet);
            const uint32x4_t normal = vtstq_u32(all, vdupq_n_u32(0x7f800000));
            return floats(vbslq_u32(normal, number, vandq_u32(all, vdupq_n_u32(0x80000000))));
        };
        auto* bytes = reinterpret_cast<uint8_t*>(p);
        vst1q_u8(bytes, upper_halves(rounded(0), rounded(1)));
        vst1q_u8(bytes + 16, upper_halves(rounded(2), rounded(3)));
    }
};
