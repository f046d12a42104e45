"""Many runs from one file: a grid of cells on shared uploads, and the tables and figures made from its results."""
