"""Noise schedules, solvers, conditioning and the loop over both experts."""
