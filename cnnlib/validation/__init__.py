"""Whether a stage computes what it should: gradients, single steps and whole timed trainings."""
