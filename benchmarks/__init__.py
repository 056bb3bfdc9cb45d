"""Ours and the peers' on the same work, in one run; results go to RESULTS.md."""
