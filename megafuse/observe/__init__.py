"""What a run tells its user: metrics, progress, curves."""
