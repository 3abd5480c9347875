"""A package of its own that teaches fastmorph a solver, morphs, a rule and a layer class, and cannot touch the library."""
