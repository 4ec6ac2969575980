"""Figures worked out from rows and outputs, outside the timed region."""
