"""Builds source packages into wheels, on a compute node, without network. See `pipeline`."""
