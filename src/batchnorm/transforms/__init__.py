"""Changes of a whole model, one verb a file."""
