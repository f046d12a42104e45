"""Sparse model inversion: images made from the uploaded models alone."""
