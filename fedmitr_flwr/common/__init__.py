"""What every part uses: files, random streams, devices, messages, and which code this is."""
