"""Extension of griffe, which reads the source code for the API pages.

* Classes decorated with `huggingface_hub.dataclasses.strict` are dataclasses, so that the fields of configurations are
  shown as parameters with types and defaults. griffe knows the decorators of the standard library only.
* A docstring section `Example:` is read like `Examples:`, so that `>>>` lines are shown as code.
"""

import re
from typing import Any

import griffe


class ApiPages(griffe.Extension):
    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        if "__init__" in cls.members or not any("strict" in str(one.value) for one in cls.decorators):
            return
        kind = griffe.ParameterKind.keyword_only
        fields = [
            griffe.Parameter(name, annotation=one.annotation, kind=kind, default=one.value)
            for name, one in cls.members.items()
            if isinstance(one, griffe.Attribute) and one.annotation is not None
        ]
        receiver = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(receiver, *fields)))

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
