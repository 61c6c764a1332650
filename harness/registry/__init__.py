"""Names to functions: ``@method``, ``@dataset``, ``@model`` and the index of everything they mark.

The index is read from source text with :mod:`ast`; nothing is imported to list names, parameters and
summaries, so ``epsbench ls`` and the validation of a suite never import torch. A function's signature is its
parameter schema::

    @method("dp-sgd", paper="arXiv:1607.00133", family="baseline")
    def dp_sgd(clip: float = 1.0, lr: float = 1.0, momentum: float = 0.9) -> Method:
        \"\"\"Clipped per-example gradients plus Gaussian noise.\"\"\"

Names come from four places: ``methods/*.py`` beside this package, ``harness/data/*.py`` and ``harness/models/*.py``,
installed packages with an entry point in the group ``epsbench.methods`` (``module`` or ``module:function``), and files
named by the user (:func:`add_file`). A file that cannot be read is listed as broken with its reason, and all others
stay usable; two functions of one name are refused.

Some parameters are not options but are handed over by the harness (:mod:`harness.registry.source` lists them). They are
left out of ``Entry.parameters``. A dataset with a parameter ``path`` and a model with a parameter ``name`` take the
text after a colon, as in ``npz:PATH`` and ``timm:NAME``.
"""

from harness.registry.options import (
    OptionError,
    Parameter,
    RegistryError,
    SpecError,
    did_you_mean,
    parse_spec,
    show,
    split_name,
)
from harness.registry.registry import (
    GROUP,
    BrokenEntry,
    DuplicateName,
    LoadError,
    Registry,
    UnknownName,
    add_file,
    bind,
    broken,
    check_options,
    dataset,
    files,
    in_file,
    index,
    installed,
    load,
    lookup,
    method,
    model,
    resolve,
)
from harness.registry.source import KINDS, Entry

__all__ = [
    "GROUP", "KINDS", "BrokenEntry", "DuplicateName", "Entry", "LoadError", "OptionError", "Parameter", "Registry",
    "RegistryError", "SpecError", "UnknownName", "add_file", "bind", "broken", "check_options", "dataset",
    "did_you_mean", "files", "in_file", "index", "installed", "load", "lookup", "method", "model", "parse_spec",
    "resolve", "show", "split_name",
]  # fmt: skip
