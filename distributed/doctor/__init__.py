"""Whether this machine can make videos, and what to do if not."""
