#include <cuda_runtime.h>

__global__ void add_one(float *values, long count) {
    long index = blockIdx.x * static_cast<long>(blockDim.x) + threadIdx.x;
    if (index < count) values[index] += 1.0f;
}

extern "C" int tiny_add_one(float *values, long count) {
    add_one<<<(count + 255) / 256, 256>>>(values, count);
    return cudaDeviceSynchronize();
}
