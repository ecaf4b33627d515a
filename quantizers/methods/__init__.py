"""The registry of methods. A method is one file here; importing this package imports them all, and none imports torch until it runs."""

import importlib
import pkgutil

from quantizers.methods.base import METHODS, Method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Method"]
