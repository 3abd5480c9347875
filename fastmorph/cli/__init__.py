"""The command `fastmorph`."""
