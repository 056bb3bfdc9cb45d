// Named as host code, and compiled as CUDA all the same (-x cu).
#include <Python.h>

void launch_by_name(float *values);
void launch_by_path(float *values);

__global__ void by_shell(float *values) { values[threadIdx.x] += 3.0f; }

static PyObject *launch(PyObject *, PyObject *address) {
    float *values = static_cast<float *>(PyLong_AsVoidPtr(address));
    launch_by_name(values);
    launch_by_path(values);
    by_shell<<<1, 32>>>(values);
    return PyLong_FromLong(cudaDeviceSynchronize());
}

static PyMethodDef methods[] = {
    {"launch", launch, METH_O, "launch(address) -> CUDA error code"},
    {nullptr, nullptr, 0, nullptr},
};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "nvcc_by_hand", nullptr, -1, methods};

PyMODINIT_FUNC PyInit_nvcc_by_hand() { return PyModule_Create(&module); }
