"""Triton kernels; imported only by the rows of the op table that launch them."""
