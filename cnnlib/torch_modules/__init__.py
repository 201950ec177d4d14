"""A network's layers as modules of PyTorch, which is imported only when they are made."""
