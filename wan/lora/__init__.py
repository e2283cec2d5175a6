"""LoRA files -> updates by official parameter name, merged row by row."""
