"""Costs of a model under a plan, and searches over plans."""
