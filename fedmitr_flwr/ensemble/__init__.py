"""The uploaded models, asked as one."""
