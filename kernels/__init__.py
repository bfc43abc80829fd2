"""GPU kernels, installed as `krrst_fast.kernels`. There are none yet: GPUs run plain PyTorch."""
