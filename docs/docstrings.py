"""Formulas of docstrings as plain text: they are written for Sphinx, and read well as they are."""

import re
from typing import Any

import griffe


class PlainFormulas(griffe.Extension):
    """Turn ``:math:`` roles and ``.. math::`` blocks into code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(
            r":math:`([^`]+)`",
            lambda found: f"`{plain(found[1])}`",
            obj.docstring.value,
            flags=re.DOTALL,
        )
        text = re.sub(
            r"\.\. math::\n((?: +.*\n?)+)", lambda found: "\n" + plain(found[1]) + "\n", text
        )
        obj.docstring.value = text


def plain(formula: str) -> str:
    formula = re.sub(r"\\text\{(.*?)\}", r"\1", formula)
    for mark, sign in {
        r"\lambda": "λ",
        r"\rho": "ρ",
        r"\log": "log",
        r"\\": "",
        "& ": "",
        "^*": "*",
        "_{ru}": "_ru",
    }.items():
        formula = formula.replace(mark, sign)
    return formula
