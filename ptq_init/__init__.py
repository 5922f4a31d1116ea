"""Post-training initialisers: one paper, one file, each a `qat.Initialiser`."""
