"""Which layers of a model share channels, found by running it once without computing anything."""
