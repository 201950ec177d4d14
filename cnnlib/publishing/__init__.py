"""A machine's results made ready to be published: complete, valid, small, with nothing private."""
