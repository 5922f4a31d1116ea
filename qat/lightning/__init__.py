"""What Lightning runs: modules, data, callbacks, and tasks."""
