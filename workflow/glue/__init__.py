"""What the rules and Snakemake call: the checked experiment, its files and its tables."""
