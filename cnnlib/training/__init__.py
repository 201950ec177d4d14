"""Training a network by a stage: the loop, its checkpoints, where it computes."""
