"""One self-attention call and what a job remembers between calls."""
