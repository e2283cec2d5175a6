"""Triton kernels for the arithmetic around a block's matrix products. One program computes one token's row."""
