"""Decoded frames on their way into files."""
