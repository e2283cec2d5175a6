"""Model files: those that there are, and the nodes that choose them."""
