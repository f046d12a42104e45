"""Hostile uploads, and the tables of docs/security.md."""
