"""What a card shows in a few minutes: is every op right, how fast is it, how fast is a search."""
