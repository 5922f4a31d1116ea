"""Images: where they come from, and what happens to them before a model."""
