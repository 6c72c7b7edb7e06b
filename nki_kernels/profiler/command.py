"""``python -m nki_kernels profile FILE.py:KERNEL --arg ...``: arguments, run, report, files.

The options are declared where the other commands are, in ``__main__``.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nki_kernels import toolchain
from nki_kernels.hardware import spec_for
from nki_kernels.machine.dtypes import as_dtype
from nki_kernels.machine.errors import DtypeError, NkiKernelsError, OptionError
from nki_kernels.machine.launch import Kernel, current_target
from nki_kernels.machine.tensor import Abstract
from nki_kernels.profiler.band import band_text
from nki_kernels.profiler.diff import diff
from nki_kernels.profiler.output import check, save_all
from nki_kernels.profiler.session import Profile, profile

USAGE_ERROR, KERNEL_ERROR = 2, 1
#: Short names of types, as they stand in model configs and papers.
_SHORT = {
    "bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32",
    "i32": "int32", "u32": "uint32", "i16": "int16", "u16": "uint16", "i8": "int8", "u8": "uint8",
    "e4m3": "float8_e4m3", "e5m2": "float8_e5m2",
}  # fmt: skip
_TENSOR = re.compile(r"(?P<dtype>[A-Za-z]\w*)\[(?P<shape>[^\]]*)\](?::(?P<fill>\w+))?")
_FORMS = (
    "allowed: dtype[d0,d1,...], the same with :zeros, :ones, :arange or :random for values, "
    "@file.npy, a Python literal, or a word"
)


def run(options: argparse.Namespace) -> int:
    """Profile one kernel; return the exit code.

    Returns:
        0; 2 where the command line is wrong; 1 where the kernel breaks a rule. Nothing has been
        written unless it is 0. Any other exception of the kernel passes through.
    """
    if toolchain.current().kind != "embedded":
        return _in_a_child(options)
    try:
        for path in options.output:
            check(path, force=options.force)
        target = options.target
        _known(target)
        args, kwargs = arguments(options.arg)
        kernel = load(options.kernel)
        _fits(kernel, options.kernel, args, kwargs)
    except OptionError as error:
        print(f"nki_kernels {error}", file=sys.stderr)
        return USAGE_ERROR
    try:
        found = profile(kernel, *args, target=target, lnc=options.lnc, **kwargs)
    except NkiKernelsError as error:
        kind = type(error).__name__
        print(f"nki_kernels profile: {options.kernel} raised {kind}: {error}", file=sys.stderr)
        return KERNEL_ERROR
    return _report(found, options)


def _report(found: Profile, options: argparse.Namespace) -> int:
    try:
        compared = diff(options.against, found) if options.against else None
        rendered = partial(found.rendered, band=options.band)
        paths = save_all(options.output, rendered, force=options.force)
    except OptionError as error:
        print(f"nki_kernels {error}", file=sys.stderr)
        return USAGE_ERROR
    print(json.dumps(found.record(band=options.band), indent=1) if options.json else found)
    if options.band and not options.json:
        print(f"\n{band_text(found.band)}")
    if compared is not None and not options.json:
        print(f"\nAgainst {options.against}\n{compared}")
    for path in paths:
        print(f"wrote {path} ({path.stat().st_size:,} bytes)", file=sys.stderr)
    return 0


def _in_a_child(options: argparse.Namespace) -> int:
    """Run the same command in a process where the embedded nki is in force."""
    command = [sys.executable, "-m", "nki_kernels", "profile", options.kernel]
    for name in ("arg", "output"):
        for value in getattr(options, name):
            command += [f"--{name}={value}"]
    for name in ("target", "lnc", "against"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name}={value}"]
    command += [f"--{name}" for name in ("force", "json", "band") if getattr(options, name)]
    env = os.environ | {toolchain.ENV: "embedded"}
    return subprocess.run(command, env=env, check=False).returncode


def _known(target: str | None) -> None:
    try:
        spec_for(current_target() if target is None else target)
    except ValueError as error:
        source = "NEURON_PLATFORM_TARGET_OVERRIDE" if target is None else "--target"
        raise OptionError(f"profile: {source}: {error}") from None


# -- arguments -------------------------------------------------------------------------------------


def arguments(words: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the named arguments that ``--arg`` words stand for.

    Raises:
        OptionError: a word that does not parse, a name given twice.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (equals and name.isidentifier()):
            args.append(_value(word, word))
        elif name in kwargs:
            raise OptionError(f"profile: --arg {word!r}: {name!r} is given twice; give it once")
        else:
            kwargs[name] = _value(text, word)
    return tuple(args), kwargs


def _value(text: str, word: str) -> Any:
    if text.startswith("@"):
        return _loaded(text[1:], word)
    match = _TENSOR.fullmatch(text)
    if match is not None:
        return _tensor(match["dtype"], match["shape"], match["fill"], word)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if text.replace(".", "_").isidentifier():
            return {"true": True, "false": False, "none": None}.get(text, text)
    raise OptionError(f"profile: --arg {word!r}: {text!r} is no argument; {_FORMS}")


def _tensor(name: str, shape: str, fill: str | None, word: str) -> Any:
    try:
        dtype = as_dtype(_SHORT.get(name, name))
    except DtypeError as error:
        short = ", ".join(_SHORT)
        raise OptionError(f"profile: --arg {word!r}: {error} (or short: {short})") from None
    try:
        extents = tuple(int(part) for part in shape.split(","))
    except ValueError:
        extents = ()
    if not extents or min(extents) < 1:
        raise OptionError(
            f"profile: --arg {word!r}: shape [{shape}]; it is one or more integers of at least 1, "
            "as in bf16[128,512]"
        )
    if fill is None:
        return Abstract(extents, str(dtype))
    makers: dict[str, Callable[[], Any]] = {
        "zeros": lambda: np.zeros(extents, np.float32),
        "ones": lambda: np.ones(extents, np.float32),
        "arange": lambda: np.arange(np.prod(extents)).reshape(extents),
        "random": lambda: np.random.default_rng(0).standard_normal(extents, np.float32),
    }
    if fill not in makers:
        raise OptionError(f"profile: --arg {word!r}: values {fill!r}; allowed: {', '.join(makers)}")
    return makers[fill]().astype(dtype.host)


def _loaded(path: str, word: str) -> Any:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"profile: --arg {word!r}: {path!r} cannot be read: {error}; give a .npy file"
        ) from None
    if not isinstance(found, np.ndarray):
        raise OptionError(f"profile: --arg {word!r}: {path!r} holds several arrays; give a .npy")
    return found


# -- the kernel ------------------------------------------------------------------------------------


def load(name: str) -> Any:
    """Return the kernel that ``FILE.py:KERNEL`` names; its file is imported, not run as a program.

    Raises:
        OptionError: no such file, or nothing callable of that name in it.
    """
    path, colon, attribute = name.rpartition(":")
    if not colon or not path:
        raise OptionError(f"profile: {name!r}; allowed is FILE.py:KERNEL: name the kernel too")
    file = Path(path)
    if not file.is_file():
        raise OptionError(
            f"profile: {path!r} is not a file (looked in {os.getcwd()}); allowed is "
            "FILE.py:KERNEL: check the path"
        )
    # Loaded now, before the file's directory goes on the path: see `run`.
    importlib.import_module("nki")
    spec = importlib.util.spec_from_file_location(f"_profiled_{file.stem}", path)
    if spec is None or spec.loader is None:
        raise OptionError(f"profile: {path!r} is no Python file; allowed is FILE.py:KERNEL")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(file.resolve().parent))
    spec.loader.exec_module(module)
    kernel = getattr(module, attribute, None)
    if not callable(kernel):
        kernels = [n for n, v in vars(module).items() if isinstance(v, Kernel)]
        raise OptionError(
            f"profile: {path!r} has no kernel {attribute!r}; it has {', '.join(kernels) or 'none'} "
            "(decorated with nki.jit): name one of these, or a plain function"
        )
    return kernel


def _fits(kernel: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    function = getattr(kernel, "func", kernel)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise OptionError(
            f"profile: {name} takes {signature}, but {error}; give every argument without a "
            "default with --arg"
        ) from None
