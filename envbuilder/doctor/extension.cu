// A small extension module that needs all that a real one needs: a host compiler, Python's headers and, where
// they are there, nvcc and a torch with the headers of the CUDA libraries. Light headers only, for it is to be
// compiled in seconds. `toolchain.extension` compiles it, by nvcc or (-x c++) by the host compiler alone.

#include <Python.h>
#ifdef WITH_TORCH
#include <c10/util/Exception.h>
#endif
#ifdef __CUDACC__
#ifdef WITH_TORCH
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAStream.h>
#define STREAM c10::cuda::getCurrentCUDAStream()
#else
#include <cuda_runtime.h>
#define STREAM 0
#endif

__global__ void doubling(double *value) { *value *= 2; }

static cudaError_t double_on_gpu(double *value) {
    double *there = nullptr;
    cudaError_t error = cudaMalloc(&there, sizeof *there);
    if (!error) error = cudaMemcpy(there, value, sizeof *there, cudaMemcpyHostToDevice);
    if (!error) {
        doubling<<<1, 1, 0, STREAM>>>(there);
        error = cudaGetLastError();
    }
    if (!error) error = cudaDeviceSynchronize();
    if (!error) error = cudaMemcpy(value, there, sizeof *there, cudaMemcpyDeviceToHost);
    cudaFree(there);
    return error;
}
#endif

static PyObject *doubled(PyObject *, PyObject *argument) {
    double value = PyFloat_AsDouble(argument);
#ifdef WITH_TORCH
    try {
        TORCH_CHECK(value != 0, "torch's C++ library answers");
    } catch (const c10::Error &error) {
        PyErr_SetString(PyExc_ValueError, error.what_without_backtrace());
        return nullptr;
    }
#endif
    return PyFloat_FromDouble(2 * value);
}

// None where there is no GPU, or the module has no GPU code.
static PyObject *doubled_on_gpu(PyObject *, PyObject *argument) {
#ifdef __CUDACC__
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) {
        double value = PyFloat_AsDouble(argument);
        cudaError_t error = double_on_gpu(&value);
        if (!error) return PyFloat_FromDouble(value);
        PyErr_SetString(PyExc_RuntimeError, cudaGetErrorString(error));
        return nullptr;
    }
#endif
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"doubled", doubled, METH_O, nullptr},
    {"doubled_on_gpu", doubled_on_gpu, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "extension", nullptr, -1, methods};
PyMODINIT_FUNC PyInit_extension() { return PyModule_Create(&module); }
