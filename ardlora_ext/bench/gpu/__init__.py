"""A first day on a GPU: everything that only a GPU can show, in one command."""
