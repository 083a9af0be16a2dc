"""What an update of the weights consists of."""
