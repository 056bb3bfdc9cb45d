"""An env as one file: the squashfs image that `install --image` writes, and a definition file for a SIF."""
