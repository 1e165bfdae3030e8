// bfloat16: the upper half of an f32, rounded to nearest, ties to even.
#pragma once
#include "cuda_runtime.h"

struct alignas(2) __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float number) {
        unsigned word;
        __builtin_memcpy(&word, &number, 4);
        // A NaN whose payload lies in the lower half stays one.
        bits = number != number ? static_cast<unsigned short>(word >> 16 | 0x40)
                                : static_cast<unsigned short>((word + 0x7fff + (word >> 16 & 1)) >> 16);
    }
    __nv_bfloat16(double number) : __nv_bfloat16(static_cast<float>(number)) {}
    explicit __nv_bfloat16(int number) : __nv_bfloat16(static_cast<float>(number)) {}
    explicit __nv_bfloat16(unsigned number) : __nv_bfloat16(static_cast<float>(number)) {}
    operator float() const {
        const unsigned word = static_cast<unsigned>(bits) << 16;
        float number;
        __builtin_memcpy(&number, &word, 4);
        return number;
    }
};
inline __nv_bfloat16 operator+(__nv_bfloat16 a, __nv_bfloat16 b) {
    return __nv_bfloat16(static_cast<float>(a) + static_cast<float>(b));
}
inline __nv_bfloat16 operator-(__nv_bfloat16 a, __nv_bfloat16 b) {
    return __nv_bfloat16(static_cast<float>(a) - static_cast<float>(b));
}
inline __nv_bfloat16 operator*(__nv_bfloat16 a, __nv_bfloat16 b) {
    return __nv_bfloat16(static_cast<float>(a) * static_cast<float>(b));
}

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline __nv_bfloat162 operator+(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x + b.x, a.y + b.y}; }
inline __nv_bfloat162 operator-(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x - b.x, a.y - b.y}; }
inline __nv_bfloat162 operator*(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x * b.x, a.y * b.y}; }
