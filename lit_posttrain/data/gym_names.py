"""Which reasoning-gym generators may be used as tasks: names only, so that both data and rewards can import it."""

EXECUTING_SCORERS = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Generators whose scorer hands the model's text to ``eval`` or ``sympy.parse_expr`` (which is ``eval``)."""


def refuse_executing(name: str) -> None:
    """Stops where scoring answers of a generator would execute what the model wrote.

    Args:
        name: reasoning-gym's name of the generator.

    Raises:
        ValueError: The scorer of ``name`` is one of :data:`EXECUTING_SCORERS`.
    """
    if name in EXECUTING_SCORERS:
        raise ValueError(
            f"reasoning-gym task {name!r} is refused: its scorer executes the text of the model's answer (eval or "
            f"sympy.parse_expr), so an answer could run any program. Choose another task; refused for the same "
            f"reason: {', '.join(sorted(EXECUTING_SCORERS - {name}))}"
        )
