"""Extension of griffe, which reads the source code for the API pages.

* Classes decorated with `huggingface_hub.dataclasses.strict` are dataclasses, so that the fields of configurations are
  shown as parameters with types and defaults. griffe knows the decorators of the standard library only.
* The parameters of an image processor are the keys of its `valid_kwargs`, with its class attributes as defaults.
* A docstring section `Example:` is read like `Examples:`, so that `>>>` lines are shown as code.
"""

import re
from typing import Any

import griffe


def annotated(cls: griffe.Class) -> dict[str, griffe.Attribute]:
    """Return the annotated attributes of a class."""
    members = cls.members.items()
    return {name: one for name, one in members if isinstance(one, griffe.Attribute) and one.annotation is not None}


def lineage(cls: griffe.Class) -> list[griffe.Class]:
    """Return the bases of a class that are defined in the same module, from the most distant one, and the class."""
    bases = [cls.parent.members.get(str(base)) for base in cls.bases] if cls.parent else []
    found = [one for base in bases if isinstance(base, griffe.Class) for one in lineage(base)]
    return [*found, cls]


class ApiPages(griffe.Extension):
    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        fields: dict[str, Any] = {}
        if any("strict" in str(one.value) for one in cls.decorators):
            for one in lineage(cls):
                fields |= {name: (field.annotation, field.value) for name, field in annotated(one).items()}
        else:
            attributes: dict[str, Any] = {}
            for one in lineage(cls):
                attributes |= one.members
            given = attributes.get("valid_kwargs")
            keys = cls.parent.members.get(str(given.value)) if given is not None and cls.parent else None
            if isinstance(keys, griffe.Class):
                # A key of transformers' own `ImagesKwargs`.
                fields["size"] = "int | dict[str, int] | None", attributes["size"].value
                for name, field in annotated(keys).items():
                    fields[name] = field.annotation, getattr(attributes.get(name), "value", None)
        if not fields or "__init__" in cls.members:
            return
        parameters = [griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)]
        for name, (annotation, default) in fields.items():
            kind = griffe.ParameterKind.keyword_only
            parameters.append(griffe.Parameter(name, annotation=annotation, kind=kind, default=default))
        parameters.append(griffe.Parameter("kwargs", kind=griffe.ParameterKind.var_keyword, annotation="Any"))
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters)))

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
