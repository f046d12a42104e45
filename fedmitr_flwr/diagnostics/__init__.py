"""What the paper claims of gradients, measured on one run: `fedmitr diagnose`."""
