"""Prompts -> text embeddings: umT5 and its tokenizer, from any file."""
