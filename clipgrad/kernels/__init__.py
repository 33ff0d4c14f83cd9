"""Kernels in Triton, their proofs, and operations of our own. Private; nothing here knows of privacy."""
