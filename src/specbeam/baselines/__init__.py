"""Peers, run on the same models and by the same clock as our methods."""
