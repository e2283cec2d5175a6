"""Several videos at once: the node, its requests, and the groups of GPUs that make them."""
