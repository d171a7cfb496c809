"""ELECTRA pretraining through DeepSpeed, with the sweeps that a study needs around it."""

__version__ = "0.1.0"
