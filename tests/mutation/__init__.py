"""Small faults, planted one at a time, and whether some test notices: ``python -m tests.mutation``."""
