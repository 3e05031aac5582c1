"""What stands in a job folder about who may run it: lease, wish to cancel, request; and its status."""
