"""From sums over the clients' frozen features to a head in closed form."""
