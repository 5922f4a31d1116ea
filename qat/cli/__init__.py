"""The command line: recipes, run folders and commands."""
