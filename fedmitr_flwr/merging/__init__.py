"""One model from the uploads in closed form."""
