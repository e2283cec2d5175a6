"""The transformer: its parts, kernels and sizes. One process, no files."""
