"""Lightning orchestrates: modules, data modules, callbacks, the command line. No maths."""
