"""What a client uploads: its form, its checks, and its file."""
