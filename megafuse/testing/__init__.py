"""Helpers for tests, shipped so that users can run them on their own cluster."""
