#pragma once
#include <cuda_runtime.h>

template <typename T, int kFactor>
__global__ void scale_kernel(T *values, long count) {
    long index = blockIdx.x * static_cast<long>(blockDim.x) + threadIdx.x;
    if (index < count) values[index] *= static_cast<T>(kFactor);
}

template <typename T, int kFactor>
int tiny_scale(T *values, long count) {
    scale_kernel<T, kFactor><<<(count + 255) / 256, 256>>>(values, count);
    return cudaDeviceSynchronize();
}
