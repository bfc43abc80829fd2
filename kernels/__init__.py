"""GPU kernels in Triton, installed as `krrst_fast.kernels` and imported only for tensors on a GPU.

Functions have the names and parameters of their twins in `krrst_fast.reference`; `input_precision`
selects how float32 is multiplied: "ieee", "tf32x3" or "fp16x3".
"""
