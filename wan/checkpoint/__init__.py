"""The transformer's files -> official tensor names -> a model with its weights."""
