"""From synthetic images to one student: tokens are relabelled, then the ensemble is distilled."""
