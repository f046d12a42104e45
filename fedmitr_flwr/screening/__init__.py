"""Which uploads are unlike the others, without any data."""
