"""Judges one stage from outside: its code runs in another process, which holds no clock."""
