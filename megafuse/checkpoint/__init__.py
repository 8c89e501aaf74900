"""torch_dist checkpoints: written atomically, resumed exactly."""
