"""Layers, whole models and jobs, timed on one or several GPUs."""
