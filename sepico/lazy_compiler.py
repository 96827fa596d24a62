"""torch's compiler, imported when it is first used.

torchvision, timm and torch's own optimisers import it to mark functions that it is not to compile:
3 CPU-seconds in every process, of which a run, a search and a test suite start many. Nothing here
compiles. Who does, `torch.compile` for one, gets the compiler itself.
"""

import importlib
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType, SimpleNamespace
from typing import Any

NAME = "torch._dynamo"
_lock = threading.Lock()


class _Lazy(ModuleType):
    """Stands in for a module; asked for more than it has, it is replaced by the module itself."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and (name != "__path__" or self.__name__ != NAME):
            raise AttributeError(name)
        with _lock:  # two threads may ask at once
            for module in (NAME, f"{NAME}.utils"):
                if isinstance(sys.modules.get(module), _Lazy):
                    del sys.modules[module]
        return getattr(importlib.import_module(self.__name__), name)


def _disable(function: Callable | None = None, *_: Any, **__: Any) -> Callable:
    """Mark a function as not to be compiled, as the compiler itself reads it later."""
    if function is None:
        return _disable
    with suppress(AttributeError):  # of a builtin
        function._torchdynamo_disable = True
    return function


def import_compiler_lazily() -> None:
    """Put the stand-ins where `import` looks first, unless the compiler is there already."""
    if NAME in sys.modules:
        return
    compiler, utils = _Lazy(NAME), _Lazy(f"{NAME}.utils")
    compiler.disable = _disable
    compiler.graph_break = lambda *_, **__: None
    # A new process group clears this cache, which is empty as long as nothing is compiled.
    compiler.trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)
    utils.is_compile_supported = lambda device: utils.__getattr__("is_compile_supported")(device)
    sys.modules |= {NAME: compiler, utils.__name__: utils}
