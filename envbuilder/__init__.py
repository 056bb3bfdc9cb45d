"""envbuilder: gets a GPU training environment onto a cluster without internet on its compute nodes."""

__version__ = "0.1.0"
