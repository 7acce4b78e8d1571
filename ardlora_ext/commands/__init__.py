"""The subcommands of `python -m ardlora_ext`: arguments in, one call of the package, text out."""
