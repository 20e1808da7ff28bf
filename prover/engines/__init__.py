"""Engines that run a model and record its trace."""
