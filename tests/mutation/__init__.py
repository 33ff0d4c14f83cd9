"""This package plants small faults one at a time and checks that a test fails: ``python -m tests.mutation``."""
