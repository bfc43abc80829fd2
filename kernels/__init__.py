"""GPU kernels in Triton, installed as `krrst_fast.kernels`; nothing here is imported without one.

Each file has the functions of the same names in `krrst_fast.reference`, with their parameters;
where there is a choice, `input_precision` says how float32 is multiplied.
"""
