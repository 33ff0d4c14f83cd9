"""This private package holds Triton kernels, their self-tests and custom operations; none depends on privacy code."""
