// The tensor cores' own instructions, in place of the functions that hold them as inline PTX in a kernel's text. Lanes put what they
// have where the others find it and meet; the first that goes on multiplies for all.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace emulation {

// What the lanes of a warp show one another. Two in turn: a lane that is one operation ahead writes the other.
struct Exchange {
    const unsigned short* lines[warp_size];
    unsigned a[warp_size][4], b[warp_size][2];
    float c[warp_size][4], d[warp_size][4];
    unsigned long done;
};
inline Exchange exchanges[32][2];

FLORA_UNCHECKED inline unsigned warp() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) / warp_size; }

// The exchange of this operation, which is the lane's so-and-so-manieth.
FLORA_UNCHECKED inline Exchange& next_exchange() {
    collective();
    return exchanges[warp()][++block.running->exchanges % 2];
}

template <bool transposed> inline void load_matrices(unsigned* (&registers)[4], const void* line) {
    Exchange& exchange = next_exchange();
    if (reinterpret_cast<uintptr_t>(line) % 16 != 0) fail("a line of a matrix starts off a multiple of 16 bytes");
    const unsigned own = lane();
    exchange.lines[own] = static_cast<const unsigned short*>(line);
    meet_warp();
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
        const unsigned short* const* lines = exchange.lines + 8 * matrix;
        const unsigned g = own / 4, t = own % 4 * 2;
        const unsigned low = transposed ? lines[t][g] : lines[g][t], high = transposed ? lines[t + 1][g] : lines[g][t + 1];
        *registers[matrix] = low | high << 16;
    }
}

template <class T> inline float number(unsigned word, unsigned at) {
    const unsigned short bits = static_cast<unsigned short>(word >> (16 * at));
    T value;
    __builtin_memcpy(&value, &bits, 2);
    return static_cast<float>(value);
}

// 16×8×16 by what all lanes have shown: f32 sums, depths in order.
template <class T> FLORA_UNCHECKED inline void multiply(Exchange& exchange) {
    float a[16][16], b[16][8], sums[16][8];
    for (unsigned other = 0; other < warp_size; ++other) {
        const unsigned g = other / 4, t = other % 4 * 2;
        for (unsigned half = 0; half < 2; ++half) {
            for (unsigned r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 8 + half] = number<T>(exchange.a[other][r], half);
            for (unsigned r = 0; r < 2; ++r) b[t + r * 8 + half][g] = number<T>(exchange.b[other][r], half);
            for (unsigned h = 0; h < 2; ++h) sums[g + 8 * h][t + half] = exchange.c[other][2 * h + half];
        }
    }
    for (unsigned row = 0; row < 16; ++row)
        for (unsigned k = 0; k < 16; ++k)
            for (unsigned column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
    for (unsigned other = 0; other < warp_size; ++other)
        for (unsigned at = 0; at < 4; ++at) exchange.d[other][at] = sums[other / 4 + at / 2 * 8][other % 4 * 2 + at % 2];
}

template <class T>
FLORA_UNCHECKED inline void multiply_add(const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4], float* (&d)[4]) {
    Exchange& exchange = next_exchange();
    const unsigned own = lane();
    __builtin_memcpy(exchange.a[own], a, sizeof a);
    __builtin_memcpy(exchange.b[own], b, sizeof b);
    __builtin_memcpy(exchange.c[own], c, sizeof c);
    meet_warp();
    // Blocks follow one another: a number that no operation of an earlier one had.
    const unsigned long operation = block.first_exchange + block.running->exchanges;
    if (exchange.done != operation) {
        multiply<T>(exchange);
        exchange.done = operation;
    }
    for (unsigned at = 0; at < 4; ++at) *d[at] = exchange.d[own][at];
}

}  // namespace emulation

#define FLORA_LOAD_MATRICES(name, transposed)                                                                        \
    inline void name(unsigned& r0, unsigned& r1, unsigned& r2, unsigned& r3, const void* line) {                     \
        unsigned* registers[4] = {&r0, &r1, &r2, &r3};                                                               \
        emulation::load_matrices<transposed>(registers, line);                                                       \
    }
FLORA_LOAD_MATRICES(__ldmatrix_m8n8___half_4x, false)
FLORA_LOAD_MATRICES(__ldmatrix_m8n8___half_4x_trans, true)
FLORA_LOAD_MATRICES(__ldmatrix_m8n8___nv_bfloat16_4x, false)
FLORA_LOAD_MATRICES(__ldmatrix_m8n8___nv_bfloat16_4x_trans, true)
#undef FLORA_LOAD_MATRICES

#define FLORA_MULTIPLY(name, T)                                                                                      \
    inline void name(const unsigned& a0, const unsigned& a1, const unsigned& a2, const unsigned& a3,                 \
                     const unsigned& b0, const unsigned& b1, const float& c0, const float& c1, const float& c2,      \
                     const float& c3, float& d0, float& d1, float& d2, float& d3) {                                  \
        const unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};                                                     \
        const float c[4] = {c0, c1, c2, c3};                                                                         \
        float* d[4] = {&d0, &d1, &d2, &d3};                                                                          \
        emulation::multiply_add<T>(a, b, c, d);                                                                      \
    }
FLORA_MULTIPLY(__mma_m16n8k16___half___half_float, __half)
FLORA_MULTIPLY(__mma_m16n8k16___nv_bfloat16___nv_bfloat16_float, __nv_bfloat16)
#undef FLORA_MULTIPLY

// With sums of halves, which are made in f32 and rounded once.
inline void __mma_m16n8k16___half___half___half(const unsigned& a0, const unsigned& a1, const unsigned& a2, const unsigned& a3,
                                                const unsigned& b0, const unsigned& b1, const unsigned& c0, const unsigned& c1,
                                                unsigned& d0, unsigned& d1) {
    const unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    const float c[4] = {emulation::number<__half>(c0, 0), emulation::number<__half>(c0, 1), emulation::number<__half>(c1, 0),
                        emulation::number<__half>(c1, 1)};
    float sums[4];
    float* d[4] = {&sums[0], &sums[1], &sums[2], &sums[3]};
    emulation::multiply_add<__half>(a, b, c, d);
    const __half halves[4] = {__half(sums[0]), __half(sums[1]), __half(sums[2]), __half(sums[3])};
    __builtin_memcpy(&d0, halves, 4);
    __builtin_memcpy(&d1, halves + 2, 4);
}
