"""How a run is spread over GPUs and machines, and sampling settings that belong together."""
