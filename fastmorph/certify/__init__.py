"""Whether a child computes what its parent computes."""
