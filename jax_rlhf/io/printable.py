"""Makes texts from data, models and user code safe to print on a terminal."""


def printable(text: str, length: int = 160) -> str:
    """A text as one line without control characters, cut to `length` characters."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) <= length else line[: length - 1] + "…"


def printable_lines(text: str) -> str:
    """A text without control characters; lines are kept, and are not cut."""
    return "\n".join(
        printable(line.replace("\t", "    "), len(line) + 1 + 4 * line.count("\t")) for line in text.split("\n")
    )
