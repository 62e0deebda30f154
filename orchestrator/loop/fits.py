"""Does an answer fit a JSON Schema, and is that one? A script, for a process that can be ended: it can take hours.

in   {"schema": ..., "answer": "..."} on standard input; without an answer, the schema is what is asked about
out  null, or one line that says what is wrong, as JSON
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any, cast

MEMORY = 2 << 30  # bytes of address space


def fault(schema: Any, answer: str) -> str | None:
    """What is wrong with `answer`; None when it is JSON that fits `schema`."""
    from jsonschema.exceptions import best_match  # pyright: ignore[reportUnknownVariableType]
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    # A registry of its own: the default one would fetch a schema's remote references over the network.
    validator: Any = validator_for(schema)(schema, registry=Registry())
    try:
        value = json.loads(answer)
        error = cast("Any", best_match)(validator.iter_errors(value))
    except ValueError as error:
        return f"it does not fit the schema: it has to be JSON alone, and is not ({error})"
    except RecursionError:
        return "it is nested too deeply"
    except Unresolvable as error:
        return f"the schema refers to {error.ref!r}, which is not part of it"
    return f"it does not fit the schema: {error.message[:500]} at {error.json_path}" if error else None


def no_schema(schema: Any) -> str | None:
    """Why it is not a JSON Schema; None where it is one, and JSON."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    if not isinstance(schema, dict):
        return "it is not a JSON object"
    try:
        json.dumps(schema, allow_nan=False)
        cast("Any", validator_for)(schema).check_schema(schema)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        return str(error)[:500]
    except SchemaError as error:
        return error.message[:500]
    return None


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    asked = json.load(sys.stdin)
    found = fault(asked["schema"], asked["answer"]) if "answer" in asked else no_schema(asked["schema"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
