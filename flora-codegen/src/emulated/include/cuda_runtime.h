// What kernels' text uses of CUDA's own headers, for a C++ compiler of the processor.
#pragma once
#include "emulation.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

inline void __syncthreads() { emulation::meet_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::meet_warp(); }

// Relaxed, as on a card: they order nothing but themselves. A thread that asks for a number lets others run, because one of them may
// have to write it.
template <class T> inline T atomicAdd(T* place, T value) {
    const T before = __atomic_fetch_add(place, value, __ATOMIC_RELAXED);
    if (value == T(0)) emulation::give_way(emulation::State::ready);
    return before;
}
template <class T> inline T atomicExch(T* place, T value) { return __atomic_exchange_n(place, value, __ATOMIC_RELAXED); }
inline float atomicAdd(float* place, float value) {
    union Word { float number; unsigned bits; };
    unsigned* bits = reinterpret_cast<unsigned*>(place);
    Word before{}, after{};
    before.bits = __atomic_load_n(bits, __ATOMIC_RELAXED);
    do after.number = before.number + value;
    while (!__atomic_compare_exchange_n(bits, &before.bits, after.bits, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before.number;
}

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float exp(float x) { return __builtin_expf(x); }
inline float erf(float x) { return __builtin_erff(x); }
inline float tanh(float x) { return __builtin_tanhf(x); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline float abs(float x) { return __builtin_fabsf(x); }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
