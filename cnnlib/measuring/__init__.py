"""Runs, sweeps and races: what is timed and sampled, and the rows that are written about it."""
