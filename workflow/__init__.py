"""Figures, tables and what the rules of the workflow call."""
