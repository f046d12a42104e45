"""Vision transformers: how they are built, run on some of their patches, and asked together."""
