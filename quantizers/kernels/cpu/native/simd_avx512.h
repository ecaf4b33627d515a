// Sixteen lanes in one register: AVX-512 with VNNI and BF16. Included inside a namespace whose code is compiled for them.
struct V {
    using F = __m512;   // 16 floats
    using D = __m512i;  // 16 int32
    using B = __m512i;  // 64 bytes
    static constexpr int kWidth = 6;   // tokens of a tile that are worked on at a time
    static constexpr int kPair = kMostTotals;  // tokens of two small tiles, one less or none, that are worked on together
    static constexpr int kBlocks = 2;  // blocks of rows that are worked on at a time
    static constexpr int kQueries = 8;  // query rows that are worked on at a time
    static constexpr int values_at_a_time(int queries) { return queries <= 6 ? 4 : 2; }  // vectors of values that they are multiplied with

    PRECIS_INLINE static F zero() { return _mm512_setzero_ps(); }
    PRECIS_INLINE static F set(float x) { return _mm512_set1_ps(x); }
    PRECIS_INLINE static F load(const float* p) { return _mm512_loadu_ps(p); }
    PRECIS_INLINE static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    PRECIS_INLINE static F add(F a, F b) { return _mm512_add_ps(a, b); }
    PRECIS_INLINE static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    PRECIS_INLINE static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    PRECIS_INLINE static F div(F a, F b) { return _mm512_div_ps(a, b); }
    PRECIS_INLINE static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    PRECIS_INLINE static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
    PRECIS_INLINE static F min(F a, F b) { return _mm512_min_ps(a, b); }
    PRECIS_INLINE static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    // Lanes below `count` of x, the others of y.
    PRECIS_INLINE static F first(int count, F x, F y) { return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << count) - 1), y, x); }
    // x * 2^n for whole n in [-126, 127].
    PRECIS_INLINE static F scale2(F x, F n) { return _mm512_scalef_ps(x, n); }
    PRECIS_INLINE static float sum(F x) {
        const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        return sum_eight(eight);
    }
    PRECIS_INLINE static float sum_eight(__m256 x) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    // The sums of four vectors, in the order of `sum`.
    PRECIS_INLINE static void sum4(F a, F b, F c, F d, float* out) {
        const __m128 p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
        const __m128 pq = _mm_add_ps(_mm_unpacklo_ps(p, q), _mm_unpackhi_ps(p, q));
        const __m128 rs = _mm_add_ps(_mm_unpacklo_ps(r, s), _mm_unpackhi_ps(r, s));
        _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(pq, rs), _mm_movehl_ps(rs, pq)));
    }
    // out[t][r] = the sum of x[t][r], in the order of `sum`: every step adds halves of two vectors at a time.
    PRECIS_INLINE static void sum16(const F (&x)[4][4], float (&out)[4][4]) {
        F eight[4];  // [rows]: four sums of four tokens each
        PRECIS_UNROLL for (int r = 0; r < 4; r++) {
            const F p = add(_mm512_shuffle_f32x4(x[0][r], x[1][r], 0x44), _mm512_shuffle_f32x4(x[0][r], x[1][r], 0xee));
            const F q = add(_mm512_shuffle_f32x4(x[2][r], x[3][r], 0x44), _mm512_shuffle_f32x4(x[2][r], x[3][r], 0xee));
            eight[r] = add(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
        }
        const F p = add(_mm512_shuffle_ps(eight[0], eight[1], 0x44), _mm512_shuffle_ps(eight[0], eight[1], 0xee));
        const F q = add(_mm512_shuffle_ps(eight[2], eight[3], 0x44), _mm512_shuffle_ps(eight[2], eight[3], 0xee));
        store(out[0], add(_mm512_shuffle_ps(p, q, 0x88), _mm512_shuffle_ps(p, q, 0xdd)));
    }
    // Lane r of x[t] becomes lane t of x[r].
    PRECIS_INLINE static void transpose(F (&x)[16]) {
        F two[16], four[16];
        PRECIS_UNROLL for (int i = 0; i < 16; i += 2)
            two[i] = _mm512_unpacklo_ps(x[i], x[i + 1]), two[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
        PRECIS_UNROLL for (int i = 0; i < 16; i += 4) PRECIS_UNROLL for (int j = 0; j < 4; j++) {
            const __m512d a = _mm512_castps_pd(two[i + j / 2]), b = _mm512_castps_pd(two[i + 2 + j / 2]);
            four[i + j] = _mm512_castpd_ps(j % 2 == 0 ? _mm512_unpacklo_pd(a, b) : _mm512_unpackhi_pd(a, b));
        }
        PRECIS_UNROLL for (int j = 0; j < 4; j++) {
            const F a = _mm512_shuffle_f32x4(four[j], four[4 + j], 0x44), b = _mm512_shuffle_f32x4(four[j], four[4 + j], 0xee);
            const F c = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0x44), d = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0xee);
            x[j] = _mm512_shuffle_f32x4(a, c, 0x88), x[4 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
            x[8 + j] = _mm512_shuffle_f32x4(b, d, 0x88), x[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
        }
    }
    PRECIS_INLINE static __m128 quarter(F x) {
        const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    }
    // The largest lane, by `max` in the order of `sum`.
    PRECIS_INLINE static float most(F x) {
        const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    // The largest magnitude as the bits of a float, so that NaN and infinity are the largest of all.
    PRECIS_INLINE static D magnitude(F x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }
    PRECIS_INLINE static D max(D a, D b) { return _mm512_max_epi32(a, b); }
    PRECIS_INLINE static int32_t largest(D x) { return _mm512_reduce_max_epi32(x); }
    // The largest of each of four vectors.
    PRECIS_INLINE static void largest4(const D (&x)[4], int32_t* out) {
        reduce4<max>(x, out);
    }

    PRECIS_INLINE static D dset(int32_t x) { return _mm512_set1_epi32(x); }
    PRECIS_INLINE static D dadd(D a, D b) { return _mm512_add_epi32(a, b); }
    PRECIS_INLINE static int32_t dsum(D x) { return _mm512_reduce_add_epi32(x); }
    PRECIS_INLINE static void dsum4(const D (&x)[4], int32_t* out) {
        reduce4<dadd>(x, out);
    }
    template <D (*op)(D, D)>
    PRECIS_INLINE static void reduce4(const D (&x)[4], int32_t* out) {
        const D p = op(_mm512_shuffle_i32x4(x[0], x[1], 0x44), _mm512_shuffle_i32x4(x[0], x[1], 0xee));
        const D q = op(_mm512_shuffle_i32x4(x[2], x[3], 0x44), _mm512_shuffle_i32x4(x[2], x[3], 0xee));
        D all = op(_mm512_shuffle_i32x4(p, q, 0x88), _mm512_shuffle_i32x4(p, q, 0xdd));  // 128 bits of each
        all = op(all, _mm512_shuffle_epi32(all, _MM_PERM_BADC));
        all = op(all, _mm512_shuffle_epi32(all, _MM_PERM_CDAB));
        const D firsts = _mm512_permutexvar_epi32(_mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12)), all);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128(firsts));
    }
    PRECIS_INLINE static F to_float(D x) { return _mm512_cvtepi32_ps(x); }
    PRECIS_INLINE static D to_int(F x) { return _mm512_cvtps_epi32(x); }  // to the nearest, ties to even
    PRECIS_INLINE static D clamp8(D x) {
        return _mm512_max_epi32(_mm512_min_epi32(x, _mm512_set1_epi32(127)), _mm512_set1_epi32(-128));
    }
    PRECIS_INLINE static void store8(int8_t* p, D x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }

    // Codes of four groups, of which p and q are the halves, as words of four: those of a group are `next` apart, and those groups `apart`; one
    // of the two is 1.
    static constexpr bool kStoresWords = true;
    PRECIS_INLINE static void store_words(const D (&p)[4], const D (&q)[4], int32_t* to, int64_t next, int64_t apart) {
        const D a = packed(p[0], q[0], p[1], q[1]), b = packed(p[2], q[2], p[3], q[3]);
        if (next == 1) {
            const D order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            const D first = _mm512_permutexvar_epi32(order, a), second = _mm512_permutexvar_epi32(order, b);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(first));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + apart), _mm512_extracti64x4_epi64(first, 1));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * apart), _mm512_castsi512_si256(second));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 3 * apart), _mm512_extracti64x4_epi64(second, 1));
            return;
        }
        store_quarters(to, next, _mm512_permutex2var_epi32(a, _mm512_setr_epi32(0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30), b));
        store_quarters(to + 4 * next, next, _mm512_permutex2var_epi32(a, _mm512_setr_epi32(1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31), b));
    }
    // Words of a, b, c and d in turn: the first of each, then the second, the third and the fourth.
    PRECIS_INLINE static D packed(D a, D b, D c, D d) { return _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)); }
    PRECIS_INLINE static void store_quarters(int32_t* to, int64_t apart, D x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(x));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + apart), _mm512_extracti32x4_epi32(x, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * apart), _mm512_extracti32x4_epi32(x, 2));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 3 * apart), _mm512_extracti32x4_epi32(x, 3));
    }

    // Into the first-level cache, or the second.
    PRECIS_INLINE static void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
    PRECIS_INLINE static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    PRECIS_INLINE static B bload(const void* p) { return _mm512_loadu_si512(p); }
    PRECIS_INLINE static void bstore(void* p, B x) { _mm512_storeu_si512(p, x); }
    PRECIS_INLINE static B band(B x, uint8_t mask) { return _mm512_and_si512(x, _mm512_set1_epi8(static_cast<char>(mask))); }
    PRECIS_INLINE static B bset(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
    PRECIS_INLINE static B less(B a, B b) { return _mm512_sub_epi8(a, b); }
    // 16 bytes less 128, each of them four times.
    PRECIS_INLINE static B spread(const void* p) {
        const B rows = _mm512_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606, 0x07070707, 0x08080808, 0x09090909,
                                         0x0a0a0a0a, 0x0b0b0b0b, 0x0c0c0c0c, 0x0d0d0d0d, 0x0e0e0e0e, 0x0f0f0f0f);
        return _mm512_xor_si512(_mm512_shuffle_epi8(table(p), rows), bset(128));
    }
    PRECIS_INLINE static B bor(B a, B b) { return _mm512_or_si512(a, b); }
    template <int N>
    PRECIS_INLINE static B shr(B x) { return _mm512_srli_epi16(x, N); }  // bits that cross a byte are masked away by the caller
    template <int N>
    PRECIS_INLINE static B shl(B x) { return _mm512_slli_epi16(x, N); }
    PRECIS_INLINE static B word(const void* p) {
        int32_t x;
        std::memcpy(&x, p, 4);
        return _mm512_set1_epi32(x);
    }
    PRECIS_INLINE static B low_half(B x) { return _mm512_and_si512(x, _mm512_set1_epi32(0xffff)); }
    PRECIS_INLINE static F as_float(B x) { return _mm512_castsi512_ps(x); }
    // Bytes as `dot` takes its unsigned operand, where they may be above 127: less 128 if kCentred, and then a sum lacks 128 times that of
    // the signed operand.
    static constexpr bool kCentred = false;
    PRECIS_INLINE static const B& centred(const B& x) { return x; }
    // acc + the four products of unsigned `w` and signed `x` in each lane, exact modulo 2^32.
    PRECIS_INLINE static D dot(D acc, B w, B x) { return _mm512_dpbusd_epi32(acc, w, x); }
    // acc + odd product, then + even product, each a fused multiply-add that takes and gives subnormals as zero. `x` is of `store_bf16`.
    PRECIS_INLINE static F dot_bf16(F acc, B w, B x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }

    // 16 bytes, and those of them that the codes 0 to 15 of `index` name.
    PRECIS_INLINE static B table(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
    PRECIS_INLINE static B lookup(B table, B index) { return _mm512_shuffle_epi8(table, index); }
    // 2^(e - 127) for bytes e from 1 to 254; 0 for 0.
    PRECIS_INLINE static F power(const void* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))), 23));
    }
    // Numbers of e4m3, times 2^-8: 16 of them as floats, 32 as bf16.
    PRECIS_INLINE static F e4m3(const void* p) {
        const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
        const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
        return _mm512_cvtph_ps(_mm256_or_si256(sign, _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x7f)), 7)));
    }
    PRECIS_INLINE static B e4m3_bf16(const void* p) {
        const auto* bytes = static_cast<const uint8_t*>(p);
        return (__m512i)_mm512_cvtne2ps_pbh(e4m3(bytes + 16), e4m3(bytes));
    }

    PRECIS_INLINE static F half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
    PRECIS_INLINE static F bytes(const void* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
    }
    // 16 numbers, then 16 more, as `store_bf16` rounds them.
    PRECIS_INLINE static B bf16(F a, F b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }
    PRECIS_INLINE static void store_first(void* p, int count, F x) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), x); }
    // Nearest bf16, ties to even; subnormals become zero.
    PRECIS_INLINE static void store_bf16(uint16_t* p, F x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
    }
};
static_assert(V::kWidth == kTile && V::kPair == kTile + 2, "tokens that are more than one tile, and up to kPair, are two");
