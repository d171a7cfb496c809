"""The Python API, which the commands use too. `electra_ds` loads it lazily.

This package and `cli/` import modules inside functions if they take seconds and not every call needs them.
"""
