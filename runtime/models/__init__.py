"""Checkpoints, model families, and putting semvid's attention into a pipeline."""
