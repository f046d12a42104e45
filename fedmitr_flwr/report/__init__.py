"""A run in pictures and a page."""
