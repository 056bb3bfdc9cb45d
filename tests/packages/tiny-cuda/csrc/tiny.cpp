// The binding alone: a full <torch/extension.h> would take most of a minute to compile.
#include <Python.h>

extern "C" int tiny_add_one(float *values, long count);

static PyObject *add_one(PyObject *, PyObject *arguments) {
    unsigned long long address;
    long count;
    if (!PyArg_ParseTuple(arguments, "Kl", &address, &count)) return nullptr;
    return PyLong_FromLong(tiny_add_one(reinterpret_cast<float *>(address), count));
}

static PyMethodDef methods[] = {
    {"add_one", add_one, METH_VARARGS, "add_one(address, count) -> CUDA error code"},
    {nullptr, nullptr, 0, nullptr},
};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny_cuda_ext", nullptr, -1, methods};

PyMODINIT_FUNC PyInit_tiny_cuda_ext() { return PyModule_Create(&module); }
