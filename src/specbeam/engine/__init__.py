"""Runs one model over token trees, and knows no decoding method."""
