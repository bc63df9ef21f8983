"""Extension of griffe: classes decorated with `huggingface_hub.dataclasses.strict` are dataclasses.

griffe reads source code and knows the decorators of the standard library only. With the extension, the API pages show
the fields of configurations as parameters, with types and defaults.
"""

from typing import Any

import griffe


class StrictDataclasses(griffe.Extension):
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
