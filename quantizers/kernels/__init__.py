"""Kernels of quantized linear layers. Importing this package registers them all; one that wraps a library imports it when first used."""

import importlib
import pkgutil

from quantizers.kernels.base import KERNELS, Kernel, LayerKind, select

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["KERNELS", "Kernel", "LayerKind", "select"]
