"""An example of a package that brings electra_ds an objective, a task and a tracker."""
