#include "tiny_scale.cuh"

template int tiny_scale<float, 2>(float *values, long count);
template int tiny_scale<float, 3>(float *values, long count);
template int tiny_scale<double, 2>(double *values, long count);
template int tiny_scale<double, 3>(double *values, long count);
