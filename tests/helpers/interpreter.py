"""Triton's interpreter, in which kernels run where no GPU is: what it does wrong, and what it does needlessly."""

from __future__ import annotations

from functools import cache
from inspect import ismodule

import numpy as np


def products_of_bfloat16() -> None:
    """It keeps bfloat16 as integers and multiplies those: its products are given their values."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    dot, multiply = InterpreterBuilder.create_dot, InterpreterBuilder.create_fmul

    def value(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(x):
        bits = np.ascontiguousarray(x.data).view(np.uint32)
        return TensorHandle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), tl.bfloat16)

    def create_dot(self, a, b, *rest):
        return dot(self, value(a), value(b), *rest)

    def create_fmul(self, a, b):
        product = multiply(self, value(a), value(b))
        return rounded(product) if a.dtype.scalar == tl.bfloat16 else product

    InterpreterBuilder.create_dot, InterpreterBuilder.create_fmul = create_dot, create_fmul


def one_patch_a_launch() -> None:
    """It puts its own functions into Triton's language again at every call inside a kernel, a third of all its time;
    within one launch once is enough for each of the modules by which functions know that language."""
    from triton.runtime import interpreter

    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    language = (interpreter.tl, interpreter.tl.core)
    modules: set[int] = set()

    @cache
    def known_to(fn):
        return {id(value) for value in fn.__globals__.values() if ismodule(value) and value in language}

    def patch_lang(fn):
        known = known_to(fn)
        if known and known <= modules:
            return interpreter._LangPatchScope()
        modules.update(known)
        return patch(fn)

    def call(self, *args, **kwargs):
        modules.clear()
        try:
            return run(self, *args, **kwargs)
        finally:
            modules.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call
