"""Vision transformers: how they are built, and run on some of their patches."""
