"""What leaves the framework: the packed file, and its check against the simulated model."""
