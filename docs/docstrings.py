"""Docstrings for the pages: formulas, which are written for Sphinx, as plain text, and examples as
code."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Turn ``:math:`` roles and ``.. math::`` blocks into code, and ``Example:`` into a section."""

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
        # griffe takes the singular for a note, and sets its code as text.
        obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.M)


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
