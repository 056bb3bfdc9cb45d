"""Programs that stand in for a compiler: standalone, standard library only."""
