"""Measurements: `python -m ardlora_ext.bench COMMAND`. Nothing in the package imports this one."""
