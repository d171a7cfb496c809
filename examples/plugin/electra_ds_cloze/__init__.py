"""An example of a package that brings electra_ds an objective and a callback."""
