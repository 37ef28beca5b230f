"""Writing a few new tokens into their slots, in place."""
