"""The training loop: schedule, step, optimizer, finiteness."""
