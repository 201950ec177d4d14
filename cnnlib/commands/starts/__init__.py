"""What `new-stage --engine` writes: whole stages, each in one file, whose name is still NAME."""
