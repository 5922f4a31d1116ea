"""What training adds to a model: losses, regularizers, and what is measured of its weights."""
