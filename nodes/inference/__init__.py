"""One video: the node, its inputs, its plan, and what it leaves."""
