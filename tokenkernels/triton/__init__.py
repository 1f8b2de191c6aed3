"""The Triton alternatives: portable kernels for GPUs without a compiler."""
