"""The report and the poster: pages made of figures and tables."""
