"""Inputs made to break what reads them."""
