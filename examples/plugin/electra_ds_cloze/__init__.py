"""An example of a package that brings electra_ds one part of each kind."""
