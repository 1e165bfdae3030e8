// Halves as the processor has them.
#pragma once
#include "cuda_runtime.h"

struct alignas(2) __half {
    _Float16 value;
    __half() = default;
    __half(float number) : value(static_cast<_Float16>(number)) {}
    __half(double number) : value(static_cast<_Float16>(number)) {}
    explicit __half(int number) : value(static_cast<_Float16>(number)) {}
    explicit __half(unsigned number) : value(static_cast<_Float16>(number)) {}
    operator float() const { return static_cast<float>(value); }
};
// Two halves are multiplied and added in f32 and rounded once, which is what one operation of halves gives.
inline __half operator+(__half a, __half b) { return __half(static_cast<float>(a) + static_cast<float>(b)); }
inline __half operator-(__half a, __half b) { return __half(static_cast<float>(a) - static_cast<float>(b)); }
inline __half operator*(__half a, __half b) { return __half(static_cast<float>(a) * static_cast<float>(b)); }

struct alignas(4) __half2 {
    __half x, y;
};
inline __half2 operator+(__half2 a, __half2 b) { return {a.x + b.x, a.y + b.y}; }
inline __half2 operator-(__half2 a, __half2 b) { return {a.x - b.x, a.y - b.y}; }
inline __half2 operator*(__half2 a, __half2 b) { return {a.x * b.x, a.y * b.y}; }
