"""The Python API, which the commands call too. `import electra_ds` offers it lazily.

This room and `cli/` import inside functions what takes seconds and is not needed by every call.
"""
