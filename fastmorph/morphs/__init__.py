"""The morphs: each is frozen data with its way to be applied, and a function on a model."""
