"""The other packages of a rank: how it imports them, and whether it can."""
