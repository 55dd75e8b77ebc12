"""Running the method: loops, data and disk."""
