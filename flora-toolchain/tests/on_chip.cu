// A kernel of the shape that the generator emits for half types: tiles in dynamic shared memory, a weight tile scaled as
// it is stored, products on tensor cores. y [m, n] = x [m, d] @ (w [d, n] * b [d] a [n]); m a multiple of 64, n of 128, d
// of 32.
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

using namespace nvcuda;

extern "C" __global__ void __launch_bounds__(128)
    on_chip(const uint4 *__restrict__ x, const uint4 *__restrict__ w, const __half *__restrict__ a,
            const __half *__restrict__ b, float *y, unsigned d, unsigned n) {
    extern __shared__ __align__(16) unsigned char dynamic_shared_mem[];
    // Shared array size: 4096, 8192 bytes
    __half *weight = reinterpret_cast<__half *>(&dynamic_shared_mem[0]);
    // Shared array size: 2048, 4096 bytes
    __half *rows = reinterpret_cast<__half *>(&dynamic_shared_mem[8192]);
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums[4][2];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++)
            wmma::fill_fragment(sums[i][j], 0.0f);
    unsigned row = blockIdx.y * 64, column = blockIdx.x * 128, plane = threadIdx.x / 32 * 32;
    for (unsigned step = 0; step < d; step += 32) {
        for (unsigned i = threadIdx.x; i < 512; i += 128) {
            unsigned at = i / 16, eight = i % 16;
            union {
                uint4 vector;
                __half values[8];
            } tile;
            tile.vector = w[((step + at) * n + column) / 8 + eight];
            for (int q = 0; q < 8; q++)
                weight[at * 128 + eight * 8 + q] =
                    __float2half(__half2float(tile.values[q]) * __half2float(b[step + at]) *
                                 __half2float(a[column + eight * 8 + q]));
        }
        for (unsigned i = threadIdx.x; i < 256; i += 128)
            reinterpret_cast<uint4 *>(rows)[i] = x[((row + i / 4) * d + step) / 8 + i % 4];
        __syncthreads();
        for (int half = 0; half < 2; half++) {
            wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> right[2];
            for (int j = 0; j < 2; j++)
                wmma::load_matrix_sync(right[j], weight + half * 16 * 128 + plane + j * 16, 128);
            for (int i = 0; i < 4; i++) {
                wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> left;
                wmma::load_matrix_sync(left, rows + i * 16 * 32 + half * 16, 32);
                for (int j = 0; j < 2; j++)
                    wmma::mma_sync(sums[i][j], left, right[j], sums[i][j]);
            }
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++)
            wmma::store_matrix_sync(y + (row + i * 16) * n + column + plane + j * 16, sums[i][j], n,
                                    wmma::mem_row_major);
}
