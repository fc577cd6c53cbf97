"""Compile a model's blocks one by one, and take that back where it fails."""

import subprocess

import torch

# What a compiler or the lack of one raises; torch's own exceptions are RuntimeErrors.
COMPILE_ERRORS = (RuntimeError, ImportError, OSError, AssertionError, subprocess.SubprocessError)


def compile_blocks(model: torch.nn.Module) -> int:
    """Have a model's blocks compiled when they are first called, and return their number.

    Blocks of one class share the compiled code, so a ViT of 40 is ready as soon as one block is; where transformers
    does not name a model's blocks, the whole of it is compiled.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names] or [model]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)


def uncompile(model: torch.nn.Module) -> None:
    """Have a model and all its parts run uncompiled again."""
    for module in model.modules():
        module._compiled_call_impl = None
