"""The network-morphism equation: what it is, when it can be exact, and how it is solved."""
