"""[rank] The model over several ranks: mesh, sequence, attention's exchange, sharding, the split VAE."""
