"""The machine: its GPUs, their locks, memory and processes. Loads without torch."""
