"""Jobs that wait for GPUs, and the actor that starts them."""
