// One tensor-core product and loads of every width, to see that each shows in the report.
#include <cuda_runtime.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <mma.h>

using namespace nvcuda::wmma;

extern "C" __global__ void product(const half *a, const half *b, float *c, const float4 *wide, const float2 *pairs,
                                   const __nv_bfloat16 *narrow) {
    __shared__ float row[256];
    fragment<matrix_a, 16, 16, 16, half, row_major> left;
    fragment<matrix_b, 16, 16, 16, half, row_major> right;
    fragment<accumulator, 16, 16, 16, float> sum;
    fill_fragment(sum, 0.0f);
    load_matrix_sync(left, a, 16);
    load_matrix_sync(right, b, 16);
    mma_sync(sum, left, right, sum);
    store_matrix_sync(c, sum, 16, mem_row_major);

    float4 four = wide[threadIdx.x];
    float2 two = pairs[threadIdx.x];
    row[threadIdx.x] = four.x + four.y * four.z + four.w + two.x * two.y + __bfloat162float(narrow[threadIdx.x]);
    __syncthreads();
    c[256 + threadIdx.x] = row[threadIdx.x ^ 1];
}
