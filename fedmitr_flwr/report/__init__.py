"""What a run leaves behind: its folder, its result and its pictures."""
