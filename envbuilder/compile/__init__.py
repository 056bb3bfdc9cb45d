"""Builds source packages into wheels, on a compute node, without network. See `pipeline`."""

from envbuilder.compile.pipeline import CompileReport, compile_recipe

__all__ = ["CompileReport", "compile_recipe"]
