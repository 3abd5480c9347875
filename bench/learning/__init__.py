"""Does a grown network learn better? Parents, children, and what one would do instead, on real data."""
