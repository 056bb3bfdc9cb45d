"""Compiling a translation unit in shards, where that is provably the same."""
