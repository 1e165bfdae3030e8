// Fragments. The warp's first lane holds a whole one and does the work of all, so that no lane has to speak to another; the others
// only count that they took part.
#pragma once
#include "cuda_runtime.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K> struct extents;
template <int M, int N, int K> struct extents<matrix_a, M, N, K> { static constexpr int rows = M, columns = K; };
template <int M, int N, int K> struct extents<matrix_b, M, N, K> { static constexpr int rows = K, columns = N; };
template <int M, int N, int K> struct extents<accumulator, M, N, K> { static constexpr int rows = M, columns = N; };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
    static constexpr int rows = extents<Use, M, N, K>::rows, columns = extents<Use, M, N, K>::columns;
    T numbers[rows * columns];
};

template <class Layout> inline constexpr bool by_rows = false;
template <> inline constexpr bool by_rows<row_major> = true;

inline bool first_lane() {
    emulation::collective();
    return emulation::lane() == 0;
}

// What the hardware asks of a matrix in memory.
template <class T> inline void check(const T* start, unsigned stride) {
    if (reinterpret_cast<uintptr_t>(start) % 32 != 0) emulation::fail("a fragment's memory starts off a multiple of 32 bytes");
    if (stride * sizeof(T) % 16 != 0) emulation::fail("a fragment's rows are no multiple of 16 bytes apart");
}

template <class Use, int M, int N, int K, class T, class Layout, class V>
inline void fill_fragment(fragment<Use, M, N, K, T, Layout>& into, V value) {
    if (!first_lane()) return;
    for (T& number : into.numbers) number = value;
}

template <class Use, int M, int N, int K, class T, class Layout, class S>
inline void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& into, const S* from, unsigned stride) {
    if (!first_lane()) return;
    check(from, stride);
    for (int row = 0; row < into.rows; ++row)
        for (int column = 0; column < into.columns; ++column)
            into.numbers[row * into.columns + column] =
                by_rows<Layout> ? from[row * stride + column] : from[column * stride + row];
}

template <int M, int N, int K, class T, class S>
inline void load_matrix_sync(fragment<accumulator, M, N, K, T>& into, const S* from, unsigned stride, layout_t layout) {
    if (!first_lane()) return;
    check(from, stride);
    for (int row = 0; row < M; ++row)
        for (int column = 0; column < N; ++column)
            into.numbers[row * N + column] = layout == mem_row_major ? from[row * stride + column] : from[column * stride + row];
}

template <int M, int N, int K, class A, class B, class C, class LayoutA, class LayoutB>
inline void mma_sync(fragment<accumulator, M, N, K, C>& to, const fragment<matrix_a, M, N, K, A, LayoutA>& a,
                     const fragment<matrix_b, M, N, K, B, LayoutB>& b, const fragment<accumulator, M, N, K, C>& c) {
    if (!first_lane()) return;
    for (int row = 0; row < M; ++row) {
        C sums[N];
        for (int column = 0; column < N; ++column) sums[column] = c.numbers[row * N + column];
        for (int k = 0; k < K; ++k) {
            const float left = a.numbers[row * K + k];
            for (int column = 0; column < N; ++column) sums[column] += left * static_cast<float>(b.numbers[k * N + column]);
        }
        for (int column = 0; column < N; ++column) to.numbers[row * N + column] = sums[column];
    }
}

template <int M, int N, int K, class T, class S>
inline void store_matrix_sync(S* to, const fragment<accumulator, M, N, K, T>& from, unsigned stride, layout_t layout) {
    if (!first_lane()) return;
    check(to, stride);
    for (int row = 0; row < M; ++row)
        for (int column = 0; column < N; ++column)
            to[layout == mem_row_major ? row * stride + column : column * stride + row] = from.numbers[row * N + column];
}

}  // namespace nvcuda::wmma
