"""The library: models in memory or in files, without settings files, run folders or Flower."""
