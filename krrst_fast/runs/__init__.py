"""Shared parts of all stages: files, settings, seeds and the environment."""
