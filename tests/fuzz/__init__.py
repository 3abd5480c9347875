"""An adversary: random networks, random plans, and what becomes of them."""
