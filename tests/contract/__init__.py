"""The contract that every method keeps: one suite over the table in ``cases.py``."""
