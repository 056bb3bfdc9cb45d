"""The checks, one theme to a file. Each file ends with its table `CHECKS`."""
