// An importable, empty Python module: importing it runs the static operator registrations.
#pragma once
#include <Python.h>

#ifndef TORCH_EXTENSION_NAME  // the build defines it; a syntax check does not
#define TORCH_EXTENSION_NAME _C
#endif
#define KRRST_JOIN_(a, b) a##b
#define KRRST_JOIN(a, b) KRRST_JOIN_(a, b)
#define KRRST_TEXT_(x) #x
#define KRRST_TEXT(x) KRRST_TEXT_(x)

PyMODINIT_FUNC KRRST_JOIN(PyInit_, TORCH_EXTENSION_NAME)(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT,
                                      KRRST_TEXT(TORCH_EXTENSION_NAME),
                                      nullptr,
                                      -1,
                                      nullptr,
                                      nullptr,
                                      nullptr,
                                      nullptr,
                                      nullptr};
  return PyModule_Create(&module);
}
