"""Triton kernels, installed as `krrst_fast.kernels`; imported only by `krrst_fast.backends`."""
