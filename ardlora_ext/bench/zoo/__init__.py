"""`bench zoo`: the journey of a user, wrap to merge, on every architecture of transformers."""
