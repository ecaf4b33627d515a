// Sixteen lanes in two registers: AVX2 with FMA and F16C. What each function means is said in simd_avx512.h.
struct V {
    struct F { __m256 lo, hi; };
    struct D { __m256i lo, hi; };
    using B = D;
    static constexpr int kWidth = 2, kPair = 0;
    static constexpr int kBlocks = 1;
    static constexpr int kQueries = 3;
    static constexpr int values_at_a_time(int) { return 4; }

    PRECIS_INLINE static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    PRECIS_INLINE static F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    PRECIS_INLINE static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    PRECIS_INLINE static void store(float* p, F x) { _mm256_storeu_ps(p, x.lo), _mm256_storeu_ps(p + 8, x.hi); }
    PRECIS_INLINE static F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
    PRECIS_INLINE static F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
    PRECIS_INLINE static F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
    PRECIS_INLINE static F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
    PRECIS_INLINE static F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
    PRECIS_INLINE static F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
    PRECIS_INLINE static F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
    PRECIS_INLINE static F round(F x) {
        constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(x.lo, mode), _mm256_round_ps(x.hi, mode)};
    }
    PRECIS_INLINE static F first(int count, F x, F y) {
        const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256 low = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes));
        const __m256 high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), lanes));
        return {_mm256_blendv_ps(y.lo, x.lo, low), _mm256_blendv_ps(y.hi, x.hi, high)};
    }
    PRECIS_INLINE static F scale2(F x, F n) { return mul(x, {power2(n.lo), power2(n.hi)}); }
    PRECIS_INLINE static __m256 power2(__m256 n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
    }
    PRECIS_INLINE static __m128 quarter(F x) {
        const __m256 eight = _mm256_add_ps(x.lo, x.hi);
        return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    }
    PRECIS_INLINE static float sum(F x) {
        const __m128 four = quarter(x);
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    PRECIS_INLINE static float most(F x) {
        const __m256 eight = _mm256_max_ps(x.lo, x.hi);
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    PRECIS_INLINE static void sum4(F a, F b, F c, F d, float* out) {
        const __m128 p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
        const __m128 pq = _mm_add_ps(_mm_unpacklo_ps(p, q), _mm_unpackhi_ps(p, q));
        const __m128 rs = _mm_add_ps(_mm_unpacklo_ps(r, s), _mm_unpackhi_ps(r, s));
        _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(pq, rs), _mm_movehl_ps(rs, pq)));
    }
    PRECIS_INLINE static void sum16(const F (&x)[4][4], float (&out)[4][4]) {
        for (int t = 0; t < 4; t++) sum4(x[t][0], x[t][1], x[t][2], x[t][3], out[t]);
    }
    PRECIS_INLINE static D magnitude(F x) {
        const __m256i mask = _mm256_set1_epi32(0x7fffffff);
        return {_mm256_and_si256(_mm256_castps_si256(x.lo), mask), _mm256_and_si256(_mm256_castps_si256(x.hi), mask)};
    }
    PRECIS_INLINE static D max(D a, D b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
    PRECIS_INLINE static int32_t largest(D x) {
        alignas(32) int32_t lane[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lane), _mm256_max_epi32(x.lo, x.hi));
        return *std::max_element(lane, lane + 8);
    }

    PRECIS_INLINE static D dset(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
    PRECIS_INLINE static D dadd(D a, D b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
    PRECIS_INLINE static int32_t dsum(D x) {
        alignas(32) int32_t lane[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lane), _mm256_add_epi32(x.lo, x.hi));
        return lane[0] + lane[1] + lane[2] + lane[3] + lane[4] + lane[5] + lane[6] + lane[7];
    }
    PRECIS_INLINE static void largest4(const D (&x)[4], int32_t* out) {
        for (int i = 0; i < 4; i++) out[i] = largest(x[i]);
    }
    PRECIS_INLINE static void dsum4(const D (&x)[4], int32_t* out) {
        for (int i = 0; i < 4; i++) out[i] = dsum(x[i]);
    }
    PRECIS_INLINE static F to_float(D x) { return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)}; }
    PRECIS_INLINE static D to_int(F x) { return {_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi)}; }
    PRECIS_INLINE static D clamp8(D x) {
        const __m256i top = _mm256_set1_epi32(127), bottom = _mm256_set1_epi32(-128);
        return {_mm256_max_epi32(_mm256_min_epi32(x.lo, top), bottom), _mm256_max_epi32(_mm256_min_epi32(x.hi, top), bottom)};
    }
    static constexpr bool kStoresWords = false;
    PRECIS_INLINE static void store8(int8_t* p, D x) {
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.lo, x.hi), 0xd8);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    }

    PRECIS_INLINE static void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
    PRECIS_INLINE static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    PRECIS_INLINE static B bload(const void* p) {
        const auto* v = static_cast<const __m256i*>(p);
        return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
    }
    PRECIS_INLINE static void bstore(void* p, B x) {
        auto* v = static_cast<__m256i*>(p);
        _mm256_storeu_si256(v, x.lo), _mm256_storeu_si256(v + 1, x.hi);
    }
    PRECIS_INLINE static B band(B x, uint8_t mask) {
        const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
        return {_mm256_and_si256(x.lo, m), _mm256_and_si256(x.hi, m)};
    }
    PRECIS_INLINE static B less(B a, B b) { return {_mm256_sub_epi8(a.lo, b.lo), _mm256_sub_epi8(a.hi, b.hi)}; }
    PRECIS_INLINE static B spread(const void* p) {
        const __m256i low = _mm256_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606, 0x07070707);
        const __m256i high = _mm256_add_epi8(low, _mm256_set1_epi8(8)), offset = _mm256_set1_epi8(-128);
        const B x = table(p);
        return {_mm256_xor_si256(_mm256_shuffle_epi8(x.lo, low), offset), _mm256_xor_si256(_mm256_shuffle_epi8(x.hi, high), offset)};
    }
    PRECIS_INLINE static B bor(B a, B b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
    template <int N>
    PRECIS_INLINE static B shr(B x) { return {_mm256_srli_epi16(x.lo, N), _mm256_srli_epi16(x.hi, N)}; }
    template <int N>
    PRECIS_INLINE static B shl(B x) { return {_mm256_slli_epi16(x.lo, N), _mm256_slli_epi16(x.hi, N)}; }
    PRECIS_INLINE static B word(const void* p) {
        int32_t x;
        std::memcpy(&x, p, 4);
        return dset(x);
    }
    PRECIS_INLINE static B low_half(B x) {
        const __m256i m = _mm256_set1_epi32(0xffff);
        return {_mm256_and_si256(x.lo, m), _mm256_and_si256(x.hi, m)};
    }
    PRECIS_INLINE static F as_float(B x) { return {_mm256_castsi256_ps(x.lo), _mm256_castsi256_ps(x.hi)}; }
    static constexpr bool kCentred = false;
    PRECIS_INLINE static const B& centred(const B& x) { return x; }
    // In 16 bits, because the byte product of AVX2 saturates.
    PRECIS_INLINE static D dot(D acc, B w, B x) { return {dot8(acc.lo, w.lo, x.lo), dot8(acc.hi, w.hi, x.hi)}; }
    PRECIS_INLINE static __m256i dot8(__m256i acc, __m256i w, __m256i x) {
        const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(w, 8);
        const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even, x_even));
        return _mm256_add_epi32(acc, _mm256_madd_epi16(odd, x_odd));
    }
    PRECIS_INLINE static F dot_bf16(F acc, B w, B x) { return {dot_bf16(acc.lo, w.lo, x.lo), dot_bf16(acc.hi, w.hi, x.hi)}; }
    PRECIS_INLINE static __m256 dot_bf16(__m256 acc, __m256i w, __m256i x) {
        const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000));
        acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, odd)), _mm256_castsi256_ps(_mm256_and_si256(x, odd)), acc);
        return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), acc);
    }

    PRECIS_INLINE static B table(const void* p) {
        const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
        return {twice, twice};
    }
    PRECIS_INLINE static B lookup(B table, B index) { return {_mm256_shuffle_epi8(table.lo, index.lo), _mm256_shuffle_epi8(table.hi, index.hi)}; }
    PRECIS_INLINE static F power(const void* p) {
        const __m128i v = _mm_loadu_si128(static_cast<const __m128i*>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(v), 23)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)), 23))};
    }
    PRECIS_INLINE static F e4m3(const void* p) {
        const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
        const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
        const __m256i halves = _mm256_or_si256(sign, _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7f)), 7));
        return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
    }
    PRECIS_INLINE static B e4m3_bf16(const void* p) {
        const auto* bytes = static_cast<const uint8_t*>(p);
        const F first = e4m3(bytes), last = e4m3(bytes + 16);
        return {upper_halves(first.lo, first.hi), upper_halves(last.lo, last.hi)};
    }
    // The upper 16 bits of each float, in order: exact for numbers that bf16 holds.
    PRECIS_INLINE static __m256i upper_halves(__m256 a, __m256 b) {
        const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(a), 16), high = _mm256_srli_epi32(_mm256_castps_si256(b), 16);
        return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    }

    PRECIS_INLINE static F half(const void* p) {
        const auto* v = static_cast<const __m128i*>(p);
        return {_mm256_cvtph_ps(_mm_loadu_si128(v)), _mm256_cvtph_ps(_mm_loadu_si128(v + 1))};
    }
    PRECIS_INLINE static F bytes(const void* p) {
        const __m128i v = _mm_loadu_si128(static_cast<const __m128i*>(p));
        return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)))};
    }
    PRECIS_INLINE static void store_bf16(uint16_t* p, F x) {
        alignas(32) float lane[16];
        store(lane, x);
        for (int i = 0; i < 16; i++) p[i] = to_bf16(lane[i]);
    }
};
