"""Every op checked, then timed against its baselines."""
