"""Triton kernels and the operators that launch them; imported only where one is about to run."""
