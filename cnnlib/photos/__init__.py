"""Photographs and scans of handwriting, turned into the images that a network was trained on."""
