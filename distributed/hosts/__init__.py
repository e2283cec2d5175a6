"""One job over several machines."""
