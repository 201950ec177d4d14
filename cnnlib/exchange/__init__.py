"""Trained weights in files: of this library, of PyTorch and of ONNX.

A file of weights alone suffices to rebuild the network, as long as it says what the network is.
Which formats do is in the table FORMATS of cnnlib.exchange.formats.
"""
