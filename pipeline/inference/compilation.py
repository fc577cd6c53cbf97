"""Compile a model's blocks, and undo it."""

import subprocess

import torch

# Raised by a failing or missing compiler; torch's own exceptions are RuntimeErrors.
COMPILE_ERRORS = (RuntimeError, ImportError, OSError, AssertionError, subprocess.SubprocessError)


def compile_blocks(model: torch.nn.Module) -> int:
    """Mark a model's blocks to be compiled at their first call, and return their number.

    Blocks of one class share the compiled code. A model whose blocks transformers does not name is compiled as a whole.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names] or [model]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)


def uncompile(model: torch.nn.Module) -> None:
    """Run a model and all its parts uncompiled again."""
    for module in model.modules():
        module._compiled_call_impl = None
