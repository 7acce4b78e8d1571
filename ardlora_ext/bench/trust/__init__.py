"""Hunts for what reliability means: kills, faults and broken files, for as long as asked (docs/reliability.md)."""
