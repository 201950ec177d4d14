"""Two folders of results compared, run by run: faster, slower, the same or unsure."""
