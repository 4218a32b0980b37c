"""The tree in the docstring of ddpm_dist.errors is the tree of the classes."""

import re

from ddpm_dist import errors


def test_the_drawing_is_the_truth() -> None:
    drawn: dict[str, str] = {}
    trail: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^([│├└─ ]*)(\w+Error)\b", line)
        if found:
            depth = len(found.group(1)) // 4
            trail[depth:] = [found.group(2)]
            drawn[found.group(2)] = trail[depth - 1] if depth else "Exception"
    classes = {
        name: cls.__mro__[1].__name__
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, errors.DdpmDistError)
    }
    assert drawn == classes


def test_a_wrong_configuration_is_a_value_error_too() -> None:
    assert issubclass(errors.ConfigError, ValueError)
