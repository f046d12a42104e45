"""The global model for those who have only its files: timm's config.json, the model card, and predictions."""
