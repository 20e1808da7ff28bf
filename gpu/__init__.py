"""The arithmetic: ops, kernels, Freivalds, hashing of rows."""
