"""One script per training stage, and the loop that they share."""
