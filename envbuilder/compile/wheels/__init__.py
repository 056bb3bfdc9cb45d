"""What is done with a built wheel: looked through, made deterministic, described."""
