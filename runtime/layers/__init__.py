"""What stands between attention calls: blocks in fewer passes, linear layers in FP8."""
