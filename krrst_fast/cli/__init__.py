"""The `krrst` command line."""
