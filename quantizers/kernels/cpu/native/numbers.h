// 16-bit floats in plain C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace precis {

inline float from_bf16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// Nearest, ties to even; subnormals become zero and NaN stays quiet, as the processors' own conversion does.
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7f800000u) == 0) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float from_half(uint16_t x) {
    const float sign = (x & 0x8000u) ? -1.0f : 1.0f;
    const int exponent = x >> 10 & 31, fraction = x & 1023;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25) : std::ldexp(static_cast<float>(fraction), -24));
}

// The nearest number of e4m3, ties to even, for |x| <= 448 (torch's float8_e4m3fn). NaN stays NaN.
inline float round_e4m3(float x) {
    constexpr uint32_t kSmallestNormal = 0x3c800000u;  // 2^-6; below it numbers are 2^-9 apart
    constexpr float kLast = 24576.0f;                  // 1.5 * 2^14, whose last bit is 2^-9
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits & 0x80000000u, magnitude = bits ^ sign;
    const uint32_t normal = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) & 0xfff00000u;
    const float small = (std::fabs(x) + kLast) - kLast;
    uint32_t subnormal;
    std::memcpy(&subnormal, &small, 4);
    bits = sign | (magnitude > 0x7f800000u ? magnitude : magnitude < kSmallestNormal ? subnormal : normal);
    std::memcpy(&x, &bits, 4);
    return x;
}

// e4m3 as fp16 has the same value times 2^-8, subnormals too.
inline uint16_t half_of_e4m3(uint8_t x) { return static_cast<uint16_t>((x & 0x80u) << 8 | (x & 0x7fu) << 7); }

}  // namespace precis
