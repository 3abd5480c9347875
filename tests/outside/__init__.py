"""A package of its own that teaches fastmorph two morphs, as someone who cannot touch the library would."""
