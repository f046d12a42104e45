"""From a data source to decoded images, and from their labels to the clients' shares."""
