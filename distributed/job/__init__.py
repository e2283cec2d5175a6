"""The contract between all processes: what a job is, and the folder in which they speak of it."""
