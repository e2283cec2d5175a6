"""Chooses how a job runs, before it does. Standard library only, but for the files' headers."""
