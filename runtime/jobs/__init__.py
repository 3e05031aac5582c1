"""One job from configuration to files: denoising, checkpoints, heartbeats, the video."""
