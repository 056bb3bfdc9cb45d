__global__ void by_path(float *values) { values[threadIdx.x] += 2.0f; }

void launch_by_path(float *values) { by_path<<<1, 32>>>(values); }
